"""An upload on its way to the disk: put aside piece by piece, within the guards, as it comes in.

State: the one file that is being received. The pieces come on the event loop; the file is written
in worker threads. What the file says is not looked at here. It need not survive a loss of power:
the folder is emptied at every start.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvserve.core.errors import KvserveError, OutOfSpace, TooLarge
from kvserve.store.disk import Disk
from kvserve.store.failures import disk_failed
from kvserve.store.guards import Limits, size
from kvserve.store.offload import offload

BLOCK_NBYTES = 4 * 2**20
"""Written at a time, so that small pieces do not each cost a thread."""


async def stage(
    disk: Disk,
    folder: Path,
    limits: Limits,
    chunks: AsyncIterator[bytes],
    *,
    declared: int | None,
) -> Path:
    """Return the new file in `folder` that holds all `chunks`.

    `declared` is how many bytes the sender promises, None if it does not say. Raises TooLarge over
    the per-save limit and OutOfSpace where the disk would be too full, both as soon as it shows,
    RequestFailed when the disk fails, and whatever `chunks` raises; nothing is left behind then.
    """
    upload = _Upload(disk, folder / f"{secrets.token_hex(16)}.upload", limits)
    try:
        await offload(upload.open, declared or 0)
        waiting = bytearray()
        async for chunk in chunks:
            waiting += chunk
            if len(waiting) >= BLOCK_NBYTES:
                await offload(upload.add, waiting)
                waiting = bytearray()
        await offload(upload.add, waiting)
        await offload(upload.close)
    except BaseException:
        await offload(upload.abandon)
        raise
    return upload.path


class _Upload:
    def __init__(self, disk: Disk, path: Path, limits: Limits) -> None:
        self.path = path
        self._disk = disk
        self._limits = limits
        self._fd: int | None = None
        self._nbytes = 0
        self._volume = (0, 0)

    def open(self, expected: int) -> None:
        with self._in_words(expected):
            self._check(expected)
            self._fd = self._disk.create(self.path)

    def add(self, data: bytearray) -> None:
        assert self._fd is not None
        with self._in_words(len(data)):
            self._check(len(data))
            self._nbytes = self._disk.write(self._fd, [memoryview(data)], self._nbytes)

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            with self._in_words(0):
                self._disk.close(fd)

    def abandon(self) -> None:
        with suppress(KvserveError):
            self.close()
        with suppress(OSError):
            self._disk.unlink(self.path)

    @contextmanager
    def _in_words(self, more: int) -> Iterator[None]:
        """Let failures of the disk, as so many more bytes were to come, out as answers."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full(more) from error
            raise disk_failed(error, *self._volume) from error

    def _check(self, more: int) -> None:
        """Raise unless so many more bytes are within the limits."""
        if self._nbytes + more > self._limits.save_nbytes:
            raise TooLarge(
                f"The file is over the limit of {size(self._limits.save_nbytes)} for one "
                "conversation.",
                code="conversation_too_large",
            )
        usage = self._disk.usage(self.path.parent)
        self._volume = (usage.used, usage.free)
        allowed = int((usage.used + usage.free) * self._limits.disk_share)
        if usage.used + more > allowed or more > usage.free:
            raise self._full(more)

    def _full(self, more: int) -> OutOfSpace:
        used, free = self._volume
        return OutOfSpace(
            f"Receiving {size(self._nbytes + more)} would fill the disk beyond "
            f"{self._limits.disk_share:.0%}: {size(used)} of {size(used + free)} are used, "
            f"{size(free)} free.",
            code="disk_full",
        )
