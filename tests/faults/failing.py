"""A disk whose Nth operation fails, once or from then on."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from kvserve.store.disk import Disk, DiskUsage

_BY_PATH = {"create", "open", "rename", "unlink", "make_folder", "fsync_folder", "names", "size_of"}
_ADDS = {"create", "write_some", "fsync", "rename", "make_folder", "fsync_folder"}
_ALL = _BY_PATH | _ADDS | {"close", "size", "read_some", "usage"}

FAULTS: dict[str, tuple[int, set[str]]] = {
    "EIO": (errno.EIO, _ALL),
    "ENOSPC": (errno.ENOSPC, _ADDS),
    "EACCES": (errno.EACCES, _BY_PATH),
    "short": (0, {"write_some", "read_some"}),
}
"""For each kind of fault its error, and the operations that can meet it: only those are counted.
A short one is no error: half of the bytes are taken, and the caller has to go on."""


class FailingDisk(Disk):
    """Fails at the `nth` (from 1) operation that can meet this fault; `for_good` at all later too.

    `failed` counts failures, `operations` lists what was called. `heal()` ends it.
    """

    def __init__(self, fault: str, nth: int, *, for_good: bool) -> None:
        super().__init__()
        self.error, self.meets = FAULTS[fault]
        self.nth = nth
        self.for_good = for_good
        self.failed = 0
        self.operations: list[str] = []
        self._num_met = 0
        self._healed = False
        self._lock = threading.Lock()

    def heal(self) -> None:
        self._healed = True

    def _fails(self, name: str) -> bool:
        with self._lock:
            self.operations.append(name)
            if self._healed or name not in self.meets:
                return False
            self._num_met += 1
            fails = self._num_met == self.nth or (self.for_good and self._num_met > self.nth)
            self.failed += fails
            return fails

    def _step(self, name: str) -> None:
        if self._fails(name):
            raise OSError(self.error, os.strerror(self.error))

    def create(self, path: Path) -> int:
        self._step("create")
        return super().create(path)

    def write_some(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not self._fails("write_some"):
            return super().write_some(fd, buffers, offset)
        some = [buffers[0][: -(-len(buffers[0]) // 2)]]
        taken = super().write_some(fd, some, offset)
        if self.error:  # a failed write may have written
            raise OSError(self.error, os.strerror(self.error))
        return taken

    def fsync(self, fd: int) -> None:
        self._step("fsync")
        super().fsync(fd)

    def close(self, fd: int) -> None:
        super().close(fd)  # a descriptor is gone whatever close reports
        self._step("close")

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step("unlink")
        super().unlink(path)

    def fsync_folder(self, folder: Path) -> None:
        self._step("fsync_folder")
        super().fsync_folder(folder)

    def make_folder(self, folder: Path) -> None:
        self._step("make_folder")
        super().make_folder(folder)

    def open(self, path: Path) -> int:
        self._step("open")
        return super().open(path)

    def size(self, fd: int) -> int:
        self._step("size")
        return super().size(fd)

    def read_some(self, fd: int, buffer: memoryview, offset: int) -> int:
        if not self._fails("read_some"):
            return super().read_some(fd, buffer, offset)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return super().read_some(fd, buffer[: -(-len(buffer) // 2)], offset)

    def size_of(self, path: Path) -> int:
        self._step("size_of")
        return super().size_of(path)

    def names(self, folder: Path) -> list[str]:
        self._step("names")
        return super().names(folder)

    def usage(self, folder: Path) -> DiskUsage:
        self._step("usage")
        return super().usage(folder)
