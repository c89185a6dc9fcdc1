"""Downloads teachers from the Hugging Face hub; no other module uses the network.

distill-bench download TEACHER...    hub names, OWNER/NAME or OWNER/NAME@REVISION
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from distill_bench.store.failures import first_line
from distill_bench.teachers.contents import content_hash, hash_is_slow
from distill_bench.teachers.folder import TeacherError, split_hub_name, teacher_folder


def make_local(teachers: Iterable[str], students: Iterable[str] = ()) -> None:
    """Download and hash the pipelines of a sweep, before its runs are resolved.

    Each of these slow steps is announced on stderr.

    Args:
        teachers: names of teachers.
        students: names of the pipelines whose transformer a student starts from.

    Raises:
        TeacherError: if there is no such teacher, or a download fails.
    """
    hashed = [fetch(name) for name in dict.fromkeys(teachers)]
    hashed += [fetch(name) / "transformer" for name in dict.fromkeys(students)]
    for folder in hashed:
        if hash_is_slow(folder):
            print(f"hashing {folder} (once)", file=sys.stderr, flush=True)
        content_hash(folder)


def fetch(name: str) -> Path:
    """Local folder of a teacher; a teacher on the hub is downloaded if missing or outdated.

    Raises:
        TeacherError: if there is no such teacher, or the download fails.
    """
    if split_hub_name(name)[0] is None or Path(name).is_dir():
        return teacher_folder(name)
    print(f"checking the hub for {name}", file=sys.stderr, flush=True)
    return download(name)


def download(name: str) -> Path:
    """Cached folder of a teacher on the hub, downloaded if it is missing or outdated.

    Args:
        name: `OWNER/NAME` or `OWNER/NAME@REVISION`.

    Raises:
        TeacherError: if the name is not a hub name, or the download fails.
    """
    repository, revision = split_hub_name(name)
    if repository is None:
        raise TeacherError(f"{name!r} is not a hub name: write OWNER/NAME or OWNER/NAME@REVISION")
    from diffusers import DiffusionPipeline, logging  # takes seconds
    from huggingface_hub.constants import HF_HUB_CACHE

    if HF_HUB_CACHE.startswith("~"):
        raise TeacherError(
            f"cannot download teacher {name!r}: this user has no home folder; "
            "set HF_HOME to a folder for downloads"
        )

    logging.set_verbosity_error()  # the error below says the same in one line
    try:
        return Path(DiffusionPipeline.download(repository, revision=revision))
    except Exception as error:
        reason = re.split(r" \(|\. ", first_line(error))[0]
        question = f"; is {revision!r} a branch, tag or commit of it?" if revision else ""
        raise TeacherError(
            f"cannot download teacher {name!r} ({type(error).__name__}: {reason}{question}); "
            "name a local folder, or download it on a machine with network access and "
            "HF_HUB_OFFLINE unset"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """Command line: download teachers into the Hugging Face cache."""
    parser = argparse.ArgumentParser(
        prog="distill-bench download", description="download teachers from the Hugging Face hub"
    )
    parser.add_argument("teachers", nargs="+", metavar="OWNER/NAME[@REVISION]")
    options = parser.parse_args(argv)
    try:
        for name in options.teachers:
            print(download(name), flush=True)
    except TeacherError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
