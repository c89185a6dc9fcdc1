"""Compiled networks that the runs of a store share.

A process compiles into a temporary folder of its own, which begins with all that the store has.
`<store>/compiled/<key>/` holds one archive per process that compiled something new: the files that
it added, in one tar file, which is written atomically and never changed. Names of these files are
digests of their content, so archives can be unpacked over each other.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from distill_bench.store.failures import first_line, os_error
from distill_bench.store.files import atomic_file, text_lines

CACHE, TRITON_CACHE = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"  # environment variables
CPUINFO = Path("/proc/cpuinfo")


@contextlib.contextmanager
def compiled_networks(store: Path) -> Iterator[None]:
    """Compile inside with the compiled networks of a store, and add new ones at the end.

    Nothing is added if an error ends the block. If the user has set TORCHINDUCTOR_CACHE_DIR, torch
    uses that folder, and the store is not used.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # torch takes seconds

    # torch itself sets the variable at an import, and a worker inherits it, maybe from another node
    # with another folder for temporary files; the name in that folder is the same
    default = default_cache_dir()
    if Path(os.environ.get(CACHE, default)).name != Path(default).name:
        yield
        return
    shared = store / "compiled" / _key()
    with tempfile.TemporaryDirectory(prefix="distill-bench-compiled-") as temporary:
        own = Path(temporary)
        _unpack(shared, own)
        before = _files(own)
        variables = {name: os.environ.get(name) for name in (CACHE, TRITON_CACHE)}
        os.environ[CACHE] = temporary  # torch sets Triton's variable to a folder in this one
        try:
            yield
        finally:
            for name, value in variables.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
        new = sorted(_files(own) - before)
        if new:
            _pack(own, new, shared)


def _unpack(shared: Path, own: Path) -> None:
    for archive in sorted(shared.glob("*.tar")):
        try:
            with tarfile.TarFile(archive) as files:
                files.extractall(own, filter="data")
        except (OSError, tarfile.TarError) as error:
            print(f"{archive} is not used: {first_line(error)}", file=sys.stderr, flush=True)


def _pack(own: Path, names: list[str], shared: Path) -> None:
    """Write an archive, named after its files; training has ended, so a failure is a warning."""
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    try:
        with (
            atomic_file(shared / f"{digest[:12]}.tar") as file,
            tarfile.TarFile(fileobj=file, mode="w") as archive,
        ):
            for name in names:
                archive.add(own / name, name)
    except OSError as error:
        print(f"compiled networks not kept in {shared}: {os_error(error)}", file=sys.stderr)


def _files(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)) for path in files}


def _key() -> str:
    """Name of a folder for all that compiled code depends on beside its source."""
    import torch  # takes seconds

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    processor = [platform.machine(), *_instructions()]
    known = [sys.version, platform.libc_ver(), processor, gpu]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    return f"torch-{torch.__version__}-{digest[:12]}"


def _instructions() -> list[str]:
    """Lines of the processor's instruction sets: compiled code uses all that it has."""
    try:
        lines = text_lines(CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return [platform.processor()]
    return sorted({line for line in lines if line.startswith(("flags", "Features"))})
