"""What passes in and out of the index about runs. Plain values, no SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from kvserve.core.identity import ModelIdentity
from kvserve.core.types import TokenIds
from kvserve.store.records import StoredConversation
from kvserve.store.segments import SegmentSpec, StoredPath, StoredSegment


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A row of the tree: the tokens `[start, end)` behind `parent_id`, None for the first.

    `key` names the prefix `[0, end)`. `file` is None when only the tokens are known; then
    `nbytes` is 0, and one segment that is not readable stands for all of it. `state` is one of
    "present", "evicted", "quarantined" and "absent".
    """

    id: int
    parent_id: int | None
    start: int
    end: int
    key: bytes
    state: str
    file: str | None
    nbytes: int
    digest: bytes | None
    hits: int
    used_at: datetime
    segments: tuple[StoredSegment, ...]


@dataclass(frozen=True, slots=True)
class PathRun:
    """A run on a path, which leaves it at `until`: `run.start < until <= run.end`."""

    run: Run
    until: int


@dataclass(frozen=True, slots=True)
class Walk:
    """How far the tree agrees with a prompt, and the runs on the way, from the root down."""

    path: StoredPath
    runs: tuple[PathRun, ...]

    @property
    def parent_id(self) -> int | None:
        """The run to hang what follows on, at `path.num_tokens`; None at the root."""
        return self.runs[-1].run.id if self.runs else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """A durable file, as the index is to know it. `specs` lie end to end."""

    file: str
    nbytes: int
    digest: bytes
    specs: Sequence[SegmentSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """A run to be added: tokens `[start, start + len(tokens))`, `key` of the prefix to its end.

    Without `content` only its tokens are noted.
    """

    start: int
    tokens: TokenIds
    key: bytes
    content: RunFile | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """A file for a run that has none, covering `[run.start, end)`.

    With `end` inside the run, the run ends there from now on and the rest of its tokens becomes a
    run of its own without a file. `key` is that of the prefix `[0, end)`.
    """

    run_id: int
    end: int
    key: bytes
    content: RunFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """All that one write changes in the index, in one transaction.

    Runs are filled first. Then `new_runs`, which lie end to end, are hung on `parent_id` at the
    start of the first of them (None: at the root). `nbytes` were written to disk for this.
    """

    identity: ModelIdentity
    namespace: bytes
    now: datetime
    fills: Sequence[Fill] = ()
    parent_id: int | None = None
    new_runs: Sequence[NewRun] = ()
    conversation: StoredConversation | None = None
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class PathUsage:
    """What a conversation holds on disk.

    `nbytes` counts whole files on its path, `shared_nbytes` those that another conversation's path
    uses too. `held_tokens` of its tokens lie in files; `ranges` are `(start, end, nbytes)` of those
    in order, where a file used in part counts by the share of its tokens.
    """

    nbytes: int
    shared_nbytes: int
    held_tokens: int
    ranges: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """All that the index knows of one run, to compare with its file."""

    run: Run
    identity: ModelIdentity
    namespace: bytes
    parent_key: bytes | None
    tokens: TokenIds


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over the whole index. `written_nbytes` since the beginning, `today_nbytes` of the UTC
    day."""

    num_conversations: int
    num_runs: int
    num_files: int
    nbytes: int
    written_nbytes: int
    today_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a file says of itself, for a row to be made of it: `run.content` is the file.

    `prefix_key` names `[0, run.start)`; `parent_key` is the key of the run it was hung on, None at
    the root.
    """

    identity: ModelIdentity
    namespace: bytes
    parent_key: bytes | None
    prefix_key: bytes
    run: NewRun


@dataclass(frozen=True, slots=True)
class Stretch:
    """The tokens `[start, until)` of a run, and their share of its file if it is there (`held`)."""

    run_id: int
    start: int
    until: int
    nbytes: int
    held: bool


@dataclass(frozen=True, slots=True)
class Kin:
    """A conversation that shares a beginning with others: its path through the runs."""

    id: str
    used_at: datetime
    path: tuple[Stretch, ...]
