"""What a client hears when disk or index fail a write: an answer, figures, no paths. Pure."""

from __future__ import annotations

import errno

from kvserve.core.errors import KvserveError, OutOfSpace, RequestFailed
from kvserve.store.errors import IndexFailed
from kvserve.store.guards import size

_FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_failed(error: OSError, used: int, free: int) -> KvserveError:
    """Return the answer for an operation on a file that failed; figures as they were before it."""
    if error.errno in _FULL:
        return full(used, free)
    name = errno.errorcode.get(error.errno or 0, "an unknown error")
    return RequestFailed(
        f"The disk failed ({name}). The conversation is on disk as it was before.",
        code="disk_failed",
    )


def index_failed(error: IndexFailed, used: int, free: int) -> KvserveError:
    """Return the answer for a transaction on the index that failed."""
    if error.full:
        return full(used, free)
    return RequestFailed(
        "The index of saved conversations could not be read or written. "
        "The conversation is on disk as it was before.",
        code="disk_failed",
    )


def full(used: int, free: int) -> OutOfSpace:
    """Return the answer for a disk, or a quota on it, that ran out during the write."""
    return OutOfSpace(
        f"The disk is full: {size(used)} were used and {size(free)} free when the write began. "
        "The conversation is on disk as it was before.",
        code="disk_full",
    )
