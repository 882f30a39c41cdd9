"""The plan of a write: which tokens' state is missing on disk, and which files will hold it. Pure.

A conversation's path goes down the tree of runs as far as that agrees with it. What is missing are
runs on the way whose file was evicted or found bad, to be filled again ("healed"), and the tail
behind them. Each such gap becomes one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from kvserve.core.identity import ModelIdentity
from kvserve.core.keys import Key, prefix_key, root_key
from kvserve.core.types import TokenIds
from kvserve.store.records import StoredConversation
from kvserve.store.runs import Commit, Fill, NewRun, Run, RunFile, Walk
from kvserve.store.segments import SegmentSpec
from kvserve.store.snapshot_header import SnapshotHeader


@dataclass(frozen=True, slots=True)
class Gap:
    """The tokens `[start, end)` of a path, whose state is to be written.

    `run` is the row that is to be filled up to `end`, None for the tail. `parent` is the key of
    the run before it, empty for the first.
    """

    start: int
    end: int
    run: Run | None
    parent: Key


def gaps(walk: Walk, num_tokens: int) -> tuple[Gap, ...]:
    """Return what a conversation of `num_tokens` tokens, all of them walked, lacks on disk.

    In order of position. A file-less run that the conversation leaves early is filled up to there.
    """
    found = []
    parent = b""
    for at in walk.runs:
        if at.run.file is None:
            found.append(Gap(at.run.start, at.until, at.run, parent))
        parent = at.run.key
    if walk.path.num_tokens < num_tokens:
        found.append(Gap(walk.path.num_tokens, num_tokens, None, parent))
    return tuple(found)


def file_name(key: Key, start: int) -> str:
    """Return the name of a run's file: by its content's name, so that no name comes from a user."""
    return f"{key.hex()}-{start}.safetensors"


def header(
    gap: Gap,
    identity: ModelIdentity,
    namespace: bytes,
    token_ids: TokenIds,
    specs: Sequence[SegmentSpec],
) -> SnapshotHeader:
    """Return the header of the file for a gap. Raises ValueError if `specs` do not cover it."""
    ends = [gap.start, *(spec.end for spec in specs)]
    if [spec.start for spec in specs] != ends[:-1] or ends[-1] != gap.end or not specs:
        raise ValueError(f"the source does not hold the tokens [{gap.start}, {gap.end})")
    root = root_key(identity.digest(), namespace)
    return SnapshotHeader(
        identity=identity,
        namespace=namespace,
        start=gap.start,
        end=gap.end,
        parent=gap.parent,
        prefix=prefix_key(root, token_ids[: gap.start]),
        key=prefix_key(root, token_ids[: gap.end]),
        token_ids=token_ids[gap.start : gap.end],
        segments=tuple(specs),
    )


def commit(
    walk: Walk,
    conversation: StoredConversation,
    written: Sequence[tuple[Gap, Key, RunFile]],
    now: datetime,
) -> Commit:
    """Return what the index is to learn, once the files are durable; keys are those of the ends."""
    fills = [
        Fill(run_id=gap.run.id, end=gap.end, key=key, content=content)
        for gap, key, content in written
        if gap.run is not None
    ]
    tails = [
        NewRun(
            start=gap.start,
            tokens=conversation.token_ids[gap.start : gap.end],
            key=key,
            content=content,
        )
        for gap, key, content in written
        if gap.run is None
    ]
    return Commit(
        identity=conversation.head.identity,
        namespace=conversation.head.namespace,
        now=now,
        fills=fills,
        parent_id=walk.parent_id,
        new_runs=tails,
        conversation=conversation,
        nbytes=sum(content.nbytes for _, _, content in written),
    )
