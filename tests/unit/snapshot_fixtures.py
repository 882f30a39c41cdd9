"""Segments that obey the layout's grammar, and files of them, for tests of the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvserve.core.identity import ModelIdentity
from kvserve.store.disk import Disk
from kvserve.store.layout import flags
from kvserve.store.segments import ArraySpec, Buffer, PackedSegment, SegmentSpec
from kvserve.store.snapshot import Expected, write_snapshot
from kvserve.store.snapshot_header import SnapshotHeader

IDENTITY = ModelIdentity(
    weights="aa" * 16,
    config="bb" * 16,
    quantisation="none",
    adapter="",
    tokenizer="cc" * 16,
    chat_template="dd" * 16,
    kv_dtype="bfloat16",
    layout="1",
)
WINDOW = 6


def make_spec(
    start: int, end: int, *, dtype: str = "BF16", window: int = 0, state: bool | None = None
) -> SegmentSpec:
    """Describe a segment of one span, a window of that size if any, and a state if not None.

    With `state` False the leaf is there, but its state was not kept.
    """
    num_tokens = end - start
    arrays = [ArraySpec(dtype, (1, 2, num_tokens, 3)), ArraySpec(dtype, (1, 2, num_tokens, 0))]
    tree: Any = {"tuple": [{"array": 0}, {"array": 1}]}
    layout: list[Any] = [{"form": "span", "tree": tree, "tokens": num_tokens}, None]
    if window:
        held = min(window, num_tokens)
        tree = {"list": [{"array": 2}, {"dict": {"scales": {"array": 3}, "bits": {"value": 4}}}]}
        arrays += [ArraySpec("F16", (1, 1, held, 2)), ArraySpec("U32", (1, 1, held, 1))]
        layout.append({"form": "window", "tree": tree, "tokens": held, "window": window})
    if state:
        n = len(arrays)
        arrays += [ArraySpec("F32", ()), ArraySpec("BOOL", (3,)), ArraySpec("I64", (0, 2))]
        attributes = {
            "offset": {"value": end},
            "name": {"value": "é"},
            "cache": {"list": [{"array": n}, {"value": None}, {"array": n + 1}]},
            "empty": {"array": n + 2},
        }
        layout.append({"form": "state", "attributes": attributes})
    elif state is not None:
        layout.append({"form": "missing"})
    restorable, whole, windows = flags(layout)
    return SegmentSpec(start, end, tuple(arrays), layout, restorable, whole, windows)


def make_segment(spec: SegmentSpec, seed: int = 0) -> PackedSegment:
    """Fill a description with bytes that its positions and the seed decide."""
    random = np.random.default_rng([spec.start, spec.end, seed])
    return PackedSegment(spec, [random.bytes(array.nbytes) for array in spec.arrays])


class ListSource:
    """A SegmentSource of segments in memory; `fault` is raised instead of segment `fails_at`."""

    def __init__(
        self,
        segments: Sequence[PackedSegment],
        fails_at: int | None = None,
        fault: BaseException | None = None,
    ) -> None:
        self.segments = segments
        self.fails_at = fails_at
        self.fault = fault

    @property
    def specs(self) -> Sequence[SegmentSpec]:
        return [segment.spec for segment in self.segments]

    async def data(self, index: int) -> Sequence[Buffer]:
        if index == self.fails_at and self.fault is not None:
            raise self.fault
        return self.segments[index].data


def make_header(specs: Sequence[SegmentSpec], **changes: Any) -> SnapshotHeader:
    """Describe a run of these segments; token ids are their positions, times seven."""
    start, end = specs[0].start, specs[-1].end
    header = SnapshotHeader(
        identity=IDENTITY,
        namespace=b"tenant",
        start=start,
        end=end,
        parent=b"p" * 16 if start else b"",
        prefix=b"q" * 16,
        key=end.to_bytes(16, "big"),
        token_ids=np.arange(start, end, dtype=np.uint32) * 7,
        segments=tuple(specs),
    )
    return replace(header, **changes)


def expected_of(header: SnapshotHeader) -> Expected:
    """Return what an index would say of this file."""
    identity = header.identity.digest()
    return Expected(key=header.key, start=header.start, end=header.end, identity=identity)


async def write_file(
    folder: Path, segments: Sequence[PackedSegment], *, disk: Disk | None = None, **changes: Any
) -> tuple[Path, SnapshotHeader]:
    """Write a run into `folder` as a store would; return its path and its description."""
    header = make_header([segment.spec for segment in segments], **changes)
    drafts = folder / "tmp"
    drafts.mkdir(parents=True, exist_ok=True)
    target = folder / header.key.hex()[-2:] / f"{header.key.hex()}-{header.start}.safetensors"
    await write_snapshot(disk or Disk(), header, ListSource(segments), target=target, drafts=drafts)
    return target, header


def bytes_of(segment: PackedSegment) -> list[bytes]:
    return [bytes(buffer) for buffer in segment.data]
