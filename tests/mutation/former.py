"""Run mutmut with the kills of an earlier run; started by `mutants.py` in a prepared folder.

`engine.py` has the operators alone, so that their digest does not depend on this file.
"""

import json
from pathlib import Path

from outcomes import changes_of

FORMER = "former.json"  # packaged module, unchanged since an earlier run -> that run's survivors
KILLED = 1  # exit code of a failing test


def keep_kills() -> None:
    """Mark mutants without a result as killed, but for the survivors of an earlier run."""
    for module, survivors in json.loads(Path(FORMER).read_text(encoding="utf-8")).items():
        results = Path("mutants") / f"{module}.meta"
        meta = json.loads(results.read_text(encoding="utf-8"))
        codes = meta["exit_code_by_key"]
        if any(code is not None for code in codes.values()):
            continue  # this folder has results of its own
        again = {tuple(survivor) for survivor in survivors}
        changes = zip(codes, changes_of(module, list(codes)), strict=True)
        meta["exit_code_by_key"] = {k: None if one in again else KILLED for k, one in changes}
        results.write_text(json.dumps(meta), encoding="utf-8")


def main() -> None:
    """Mark the kills between mutmut's generation of mutants and its tests."""
    import engine
    from mutmut import __main__ as command  # reads the settings in the working directory

    create = command.create_mutants

    def create_and_mark(*arguments):
        created = create(*arguments)
        keep_kills()
        return created

    command.create_mutants = create_and_mark
    engine.main()


if __name__ == "__main__":
    main()
