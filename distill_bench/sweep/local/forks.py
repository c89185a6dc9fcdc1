"""Fork workers from one process with preloaded libraries, which saves 5 s of CPU per worker.

The fork server imports libraries but not this package. Each worker imports the package when it
starts, so it runs the code that its provenance records. On machines with GPUs, workers are not
forked: an import may initialise CUDA, which does not survive a fork.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

LIBRARIES = [
    "torch.distributed.fsdp",
    "accelerate",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "transformers.modeling_utils",
    "peft",
    "open_clip",
    "torch.utils.tensorboard",
    "pydantic",
    "rich.progress",
]
LONGEST_TEMPORARY_FOLDER = 70  # bytes; the path of the server's socket may have 107

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)
threads_of_server: list[int] = []  # set by the first fork


def can_fork(threads: int) -> bool:
    """True if a worker with this many threads can be a fork.

    Libraries read the number of threads when the server imports them, at the first fork.
    """
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPORARY_FOLDER:
        return False
    threads_of_server[:] = threads_of_server or [threads]
    return threads_of_server == [threads]


def fork(argv: list[str], env: dict[str, str], log: Path, threads: int) -> "Fork | None":
    """Fork a worker (arguments: see `Fork`); None if a plain process has to be started instead.

    Raises:
        OSError: if the log cannot be written.
    """
    log.open("ab").close()
    try:
        return Fork(argv, env, log) if can_fork(threads) else None
    except (OSError, EOFError) as error:  # no folder for the server's socket, no memory, ...
        print(
            f"no fork server ({str(error) or type(error).__name__}): plain processes",
            file=sys.stderr,
        )
        threads_of_server[:] = [0]  # do not try again
        return None


class Fork:
    """A forked `python -m MODULE ...` with the methods of Popen that workers.py uses."""

    def __init__(self, argv: list[str], env: dict[str, str], log: Path) -> None:
        """Start the module argv[0] with the arguments argv[1:] and `env` over the environment."""
        before = dict(os.environ)
        os.environ.update(env)  # the server inherits it
        try:
            environment = dict(os.environ)
            self._process = _context.Process(target=_run_module, args=(argv, environment, str(log)))
            self._process.start()
        finally:
            for key in env:
                if key in before:
                    os.environ[key] = before[key]
                else:
                    del os.environ[key]
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def wait(self) -> None:
        """Wait until the process has ended."""
        self._process.join()


def _run_module(argv: list[str], env: dict[str, str], log: str) -> None:
    """Run a module as `python -m` does, in a new session; called in the fork."""
    os.setsid()
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(env)
    module, *sys.argv[1:] = argv
    runpy.run_module(module, run_name="__main__", alter_sys=True)
