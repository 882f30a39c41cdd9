"""Every family's state goes through files and comes back bit for bit, and is used like the RAM's.

A conversation of two turns is written as two runs, the second of which begins inside a segment; a
second server, with nothing in RAM, takes both files in and goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kvserve.cache.codec import SegmentPath, SegmentPayload, State, arrays_in
from kvserve.cache.codec_forms import fits
from kvserve.cache.codec_pack import Piece, describe, pieces, unpack
from kvserve.cache.stored import needed, restorable
from kvserve.core.types import TokenIds
from kvserve.engine.batch import relative_difference
from kvserve.store.disk import Disk
from kvserve.store.segments import Buffer, SegmentSpec, StoredPath, StoredSegment
from kvserve.store.snapshot import read_segments, write_snapshot
from kvserve.store.snapshot_header import SnapshotHeader
from tests.families import zoo
from tests.families.driver import Driver, Outcome, Tokens, loaded
from tests.families.test_reuse import TOLERANCE, assert_equals_cold, tokens
from tests.unit.snapshot_fixtures import IDENTITY

pytestmark = pytest.mark.families

NAMESPACE = b""
CUT_BACK = 3
"""The first run leaves so many tokens of its turn to the second."""


class Source:
    """A `SegmentSource` over a path that stays in RAM."""

    def __init__(self, made: Sequence[Piece], held: SegmentPath) -> None:
        self._made = made
        self._held = held
        self.specs: Sequence[SegmentSpec] = [piece.spec for piece in made]

    async def data(self, index: int) -> Sequence[Buffer]:
        return self._made[index].pack(self._held)


class Shelf:
    """Run files of one conversation, and what an index would say of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = Disk()
        self.path = StoredPath(NAMESPACE, np.zeros(0, np.uint32), 0, ())
        folder.mkdir()

    def write(self, token_ids: TokenIds, held: SegmentPath) -> None:
        """Write what the path is longer than what is here."""
        start, end = self.path.num_tokens, len(token_ids)
        run = len(list(self.folder.iterdir()))
        (made,) = pieces(held, self.path, [(start, end)])
        source = Source(made, held)
        header = SnapshotHeader(
            identity=IDENTITY,
            namespace=NAMESPACE,
            start=start,
            end=end,
            parent=b"",
            prefix=b"%d" % start,
            key=b"%d" % end,
            token_ids=token_ids[start:],
            segments=tuple(source.specs),
        )
        target = self.folder / f"{run}.safetensors"
        asyncio.run(write_snapshot(self.disk, header, source, target=target, drafts=self.folder))
        added = [
            StoredSegment(
                *(run, index, s.start, s.end, s.nbytes, s.restorable, s.whole, s.windows, True)
            )
            for index, s in enumerate(source.specs)
        ]
        self.path = StoredPath(NAMESPACE, token_ids, end, (*self.path.segments, *added))

    def read(self, position: int) -> list[tuple[int, int, SegmentPayload]]:
        """Return the segments for the state at `position`."""
        found = []
        for segment in needed(self.path, position):
            file = self.folder / f"{segment.run_id}.safetensors"
            (packed,) = read_segments(self.disk, file, [segment.index])
            assert packed.spec.nbytes == segment.nbytes
            found.append((segment.start, segment.end, unpack(packed)))
        return found


def held_of(driver: Driver, path: Tokens) -> SegmentPath:
    lease = driver.cache.lookup(NAMESPACE, np.array(path, np.uint32))
    assert lease.num_tokens == len(path)
    held = driver.cache.payloads(lease)
    driver.cache.release(lease)
    return held


def assert_same_bits(one: SegmentPayload, other: SegmentPayload) -> None:
    """Bytes are compared by the packed form, types and all else by the layout."""
    length = one.length
    assert describe(one, 0, length) == describe(other, 0, length)
    for a, b in zip(one.parts, other.parts, strict=True):
        assert type(a) is type(b)
        for x, y in zip(arrays_of(a), arrays_of(b), strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            left: Any = x
            right: Any = y
            assert bytes(memoryview(left)) == bytes(memoryview(right))


def arrays_of(part: Any) -> list[mx.array]:
    if part is None:
        return []
    return arrays_in(part.attributes if isinstance(part, State) else part.arrays)


@pytest.mark.parametrize("family", zoo.families(), ids=lambda family: family.name)
def test_a_conversation_goes_on_from_its_files_as_from_ram(
    family: zoo.Family, tmp_path: Path
) -> None:
    model = loaded(zoo.build(family), family.name)
    driver, shelf = Driver(model), Shelf(tmp_path / "snapshots")
    history, suffix = [tokens(1, 37), tokens(3, 9)], tokens(2, 3)
    first = driver.ask(history, suffix, tokens(4, 21))
    held = held_of(driver, first.path)
    shelf.write(np.array(first.path[:-CUT_BACK], np.uint32), held)

    history = [*history, [*first.path[sum(map(len, history)) :], 99], tokens(5, 25)]
    second = driver.ask(history, suffix, tokens(6, 18))
    held = held_of(driver, second.path)
    shelf.write(np.array(second.path, np.uint32), held)
    position = restorable(shelf.path, len(second.path))
    assert position == len(second.path)

    segments = shelf.read(position)
    assert all(fits(payload, model.forms) for _, _, payload in segments)
    in_ram = {(start, end): payload for start, end, payload in held}
    same = [part for part in segments if part[:2] in in_ram]
    assert len(same) >= len(segments) - 2
    for start, end, payload in same:
        assert_same_bits(payload, in_ram[start, end])

    other = Driver(model)
    assert other.cache.adopt(NAMESPACE, shelf.path.token_ids, segments) == position
    other.cache.check()
    follow = [*history, [*second.path[sum(map(len, history)) :], 99], tokens(7, 6)]
    questions = [
        (follow, tokens(8, 5)),
        (history[:2], tokens(10, 7)),
        ([*history[:1], tokens(15, 8)], tokens(16, 3)),
    ]
    reused = []
    for messages, reply in questions:
        warm = driver.ask(messages, suffix, reply)
        restored = other.ask(messages, suffix, reply)
        reused.append(restored.reused)
        assert_alike(restored, warm)
        if family.name not in zoo.CHUNKING_DIFFERS:
            assert_equals_cold(other, restored)
    assert reused[0] == position and reused[2] >= len(history[0])


def assert_alike(restored: Outcome, warm: Outcome) -> None:
    """The same reuse gives the same logits exactly, another one nearly the same."""
    if restored.reused == warm.reused:
        assert mx.array_equal(restored.logits, warm.logits)
    else:
        assert relative_difference(restored.logits, warm.logits) <= TOLERANCE
