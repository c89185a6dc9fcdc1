"""Failure kinds, by which --retry-failed selects runs."""

import errno

import pytest
import torch

from distill_bench.store.failures import (
    FAILURE_KINDS,
    CodeChanged,
    failure_kind,
    first_line,
    os_error,
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "cuda_oom"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "cuda_oom"),
        (MemoryError(), "host_oom"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), "host_oom"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
        (RuntimeError("SafetensorError: No space left on device (os error 28)"), "disk_full"),
        (PermissionError(errno.EACCES, "Permission denied"), "read_only"),
        (OSError(errno.EROFS, "Read-only file system"), "read_only"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "exception"),
        (CodeChanged("other code"), "code_changed"),
        (ValueError("x"), "exception"),
    ],
)
def test_every_error_has_a_kind_that_retry_failed_knows(error, kind):
    assert failure_kind(error) == kind
    assert kind in FAILURE_KINDS


def test_an_error_is_shortened_to_one_line():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError("")) == "ValueError"
    assert len(first_line(ValueError("x" * 999))) == 300


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError("AF_UNIX path too long"), "AF_UNIX path too long"),
        (FileNotFoundError(2, "No such file or directory", "a"), "No such file or directory: a"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(), "OSError"),
    ],
)
def test_a_system_error_is_never_printed_as_none(error, text):
    assert os_error(error) == text
