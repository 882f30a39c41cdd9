"""The errors of the store.

    KvserveError
    └── StoreError                     the store cannot be opened: locked, newer, unusable
        ├── StoreLocked                another process holds the data folder
        └── SchemaTooNew               written by a later version of kvserve
    IndexFailed                        the index could not be read or written now; nothing changed
    └── IndexDamaged                   it is not an index, or no longer whole
    TreeChanged                        runs came or went since the walk: walk again
    SnapshotDamaged                    a file is missing, torn or altered: costs a prefill
    SourceGone                         what was to be written is no longer in memory: a skip

Guards refuse with `TooLarge` (over the per-save limit) and `OutOfSpace` (disk, store's budget, the
day's write budget) of `kvserve.core.errors`; their messages hold the figures (needed, allowed,
free) and never a path.
"""

from __future__ import annotations

from kvserve.core.errors import KvserveError, OutOfSpace, TooLarge

__all__ = [
    "IndexDamaged",
    "IndexFailed",
    "OutOfSpace",
    "SchemaTooNew",
    "SnapshotDamaged",
    "SourceGone",
    "StoreError",
    "StoreLocked",
    "TooLarge",
    "TreeChanged",
]


class StoreError(KvserveError):
    """The store cannot be opened; the message is for the person who starts the program."""


class StoreLocked(StoreError):
    """Another process works on this data folder."""


class SchemaTooNew(StoreError):
    """The index was written by a later version."""


class IndexFailed(Exception):
    """A transaction on the index failed as a whole and changed nothing; `full` for want of room."""

    def __init__(self, detail: str, *, full: bool = False) -> None:
        super().__init__(detail)
        self.full = full


class IndexDamaged(IndexFailed):
    """The file of the index is not a database of kvserve, or is no longer whole."""


class TreeChanged(Exception):
    """A write does not fit the tree as it is now: it rests on a walk that is out of date."""


class SnapshotDamaged(Exception):
    """The file of a run cannot be used. `run_id` names it in the index, `reason` is one word:
    "missing", "truncated", "header", "digest", "foreign" or "io"."""

    def __init__(self, run_id: int, reason: str, detail: str = "") -> None:
        super().__init__(f"run {run_id}: {reason} {detail}".rstrip())
        self.run_id = run_id
        self.reason = reason


class SourceGone(Exception):
    """A segment that was to be written is no longer held in memory."""
