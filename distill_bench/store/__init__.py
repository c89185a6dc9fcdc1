"""Run folders on disk: atomic files, claims, run states, stop requests. Imports no torch.

    runs/
        <run_id>/run.yaml                the resolved config
            attempts/001/                creating this folder claims the run; never deleted
                start.json  heartbeat  exit.json
            checkpoints/  students/  samples/  train.jsonl  metrics.jsonl
            result.json                  the only definition of "done"
        references/<protocol>/           reference rows, shared by all runs of a protocol
        sweeps/<name>.json               one manifest per sweep
        submissions/  cancels/           one file per call
        errors/<run_id>.json             an error that the run's own folder could not hold

Each file has one writer. The store uses no pickles and no database. A run's state is a pure
function of its folder and of the scheduler's queue.
"""
