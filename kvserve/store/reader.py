"""Gives back segments from runs' files, without asking the index.

State: for the runs that walks have found, which file each has and what that must say of itself;
bounded, the longest unasked out first. `learn` and `forget` belong to the event loop; `read` is for
worker threads, any number at a time, and only looks a run up. What it finds out of date shows when
the file is opened: a run's id is never given again, and a file is immutable or gone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvserve.core.identity import ModelIdentity
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.runs import PathRun
from kvserve.store.segments import PackedSegment, StoredSegment
from kvserve.store.shelves import Shelves
from kvserve.store.snapshot import Expected, read_segments
from kvserve.store.upkeep import expected_of

MAX_KNOWN = 2**17


@dataclass(frozen=True, slots=True)
class _Known:
    path: Path
    expected: Expected


class Reader:
    """Reads runs' files of one data folder."""

    def __init__(self, shelves: Shelves) -> None:
        self._shelves = shelves
        self._known: OrderedDict[int, _Known] = OrderedDict()

    def learn(self, runs: Iterable[PathRun], identity: ModelIdentity) -> None:
        """Remember where the runs' files are."""
        for at in runs:
            run = at.run
            if run.file is None:
                self.forget(run.id)
                continue
            path = self._shelves.folder.of(run.file)
            self._known[run.id] = _Known(path, expected_of(run, identity))
            self._known.move_to_end(run.id)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def forget(self, run_id: int) -> None:
        """Note that a run has no file any more, or another one."""
        self._known.pop(run_id, None)

    def read(self, segments: Sequence[StoredSegment]) -> list[PackedSegment]:
        """Return segments that a walk has found, each verified, in the order given.

        Raises SnapshotDamaged, "missing" for one that was evicted since.
        """
        found: dict[tuple[int, int], PackedSegment] = {}
        for run_id in dict.fromkeys(segment.run_id for segment in segments):
            own = [segment for segment in segments if segment.run_id == run_id]
            for segment, packed in zip(own, self._read_run(run_id, own), strict=True):
                if (packed.spec.start, packed.spec.end) != (segment.start, segment.end):
                    raise SnapshotDamaged(run_id, "foreign", "other segments")
                found[(run_id, segment.index)] = packed
        return [found[(segment.run_id, segment.index)] for segment in segments]

    def _read_run(self, run_id: int, own: Sequence[StoredSegment]) -> list[PackedSegment]:
        known = self._known.get(run_id)
        if known is None:
            raise SnapshotDamaged(run_id, "missing", "not known any more")
        try:
            return read_segments(
                self._shelves.disk,
                known.path,
                [segment.index for segment in own],
                run_id=run_id,
                expected=known.expected,
            )
        except IndexError:
            raise SnapshotDamaged(run_id, "foreign", "fewer segments") from None
