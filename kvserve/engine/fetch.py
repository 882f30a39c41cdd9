"""Reading stored segments in the background, for requests that have been admitted.

Owns two reader threads and nothing else; what they read are bytes, which the engine thread makes
arrays of. A file that cannot be used is reported, and the read goes on with what lies before it:
the cache may only make things faster.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from kvserve.cache.stored import needed, restorable
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.segments import PackedSegment, StoredPath, StoredSegment

log = logging.getLogger(__name__)

NUM_READERS = 2

Read = Callable[[Sequence[StoredSegment]], list[PackedSegment]]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Segments from disk by which the first `num_tokens` tokens can be restored.

    They hold all that memory lacked when the read began, and go with what it then held. The last
    segment agrees with the prompt up to `num_matched`; what it holds behind that is another
    conversation's. `damaged` says that a file could not be used.
    """

    num_tokens: int
    num_matched: int
    segments: Sequence[PackedSegment]
    damaged: bool = False


class Fetcher:
    """Reads what the disk holds of a prompt.

    Args:
        read: returns the bytes of segments; called in reader threads. Raises SnapshotDamaged.
        on_damage: told the run and the reason of damage; called in reader threads.
    """

    def __init__(self, read: Read, on_damage: Callable[[int, str], None]) -> None:
        self._read = read
        self._on_damage = on_damage
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="fetch")

    def begin(
        self, path: StoredPath, held: int, limit: int, done: Callable[[Fetched], None]
    ) -> None:
        """Start to read; `done` is called in a reader thread, whatever happens.

        `held` leading tokens can be restored from memory; at most `limit` are wanted.
        """

        def work() -> None:
            try:
                fetched = self.fetch(path, held, limit)
            except Exception:  # request ring: the prompt is prefilled instead
                log.exception("stored state could not be read")
                fetched = Fetched(0, 0, ())
            done(fetched)

        self._readers.submit(work)

    def fetch(self, path: StoredPath, held: int, limit: int) -> Fetched:
        """Return the segments that bring a state further than `held`, as far as files allow."""
        damaged = False
        while True:
            position = restorable(path, limit, held)
            if position <= held:
                return Fetched(0, 0, (), damaged)
            wanted = needed(path, position, held)
            try:
                segments = self._read(wanted)
            except SnapshotDamaged as damage:
                log.warning("a stored state cannot be used: %s", damage)
                self._on_damage(damage.run_id, damage.reason)
                path, damaged = _without(path, damage.run_id), True
                continue
            return Fetched(position, _num_matched(path, position), segments, damaged)

    def close(self) -> None:
        """Let running reads end."""
        self._readers.shutdown()


def _num_matched(path: StoredPath, position: int) -> int:
    """Return up to where the segments that are read for `position` hold the prompt's tokens.

    That is where the path's next segment begins, be it readable or not: the one before it may go on
    beyond, as the run from which the path has parted there, with another conversation's tokens.
    """
    behind = (segment.start for segment in path.segments if segment.start >= position)
    return min(behind, default=path.num_tokens)


def _without(path: StoredPath, run_id: int) -> StoredPath:
    segments = tuple(
        replace(segment, readable=False) if segment.run_id == run_id else segment
        for segment in path.segments
    )
    return replace(path, segments=segments)
