"""Failure kinds, and one-line error messages."""

import errno

from distill_bench.store.files import text_lines

FAILURE_KINDS = (  # accepted by `--retry-failed=KIND`
    "cuda_oom",
    "host_oom",
    "disk_full",
    "read_only",
    "timeout",
    "code_changed",
    "not_started",
    "exception",
)


class CodeChanged(RuntimeError):
    """The code has changed since the run began."""


def failure_kind(error: BaseException) -> str:
    """The kind of a failure, one of FAILURE_KINDS."""
    message = str(error)
    # compared by name, because importing torch takes seconds
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in message:
        return "cuda_oom"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in message:
        return "host_oom"
    if isinstance(error, CodeChanged):
        return "code_changed"
    number = error.errno if isinstance(error, OSError) else None
    # safetensors raises its own error type with the system's message
    full = "No space left on device" in message or "Disk quota exceeded" in message
    if full or number in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "read_only"
    return "exception"


def os_error(error: OSError) -> str:
    """Reason of an OSError, and the file concerned if it is known; never "None"."""
    reason = error.strerror or first_line(error)
    return reason if error.filename is None else f"{reason}: {error.filename}"


def first_line(error: BaseException) -> str:
    """First line of an error's message, at most 300 characters; its type if it has no message."""
    lines = text_lines(str(error).strip())
    return lines[0][:300] if lines else type(error).__name__
