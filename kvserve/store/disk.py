"""The store's only way to files other than SQLite's: one method for each operation of the system.

Stateless but for the folders whose entry is known to be durable. Any worker thread may call it;
every method may block and may raise OSError. Tests put a failing or a recording disk in its place,
so nothing here combines operations, and nothing of the store goes around it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_FULLFSYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)
"""macOS: `fsync` hands data to the drive, only this makes the drive write it."""

_CANNOT = {errno.EINVAL, errno.ENOTTY, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""A file system that does not know an operation, as opposed to one that fails at it."""

_PER_CALL_BUFFERS = 512
"""Below every system's IOV_MAX (1024)."""


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Bytes of a volume: in use, free for this user, and in all."""

    used: int
    free: int
    total: int


class Disk:
    """Files are handled by descriptor, which the caller closes."""

    def __init__(self) -> None:
        self._settled: set[Path] = set()

    # -- writing ------------------------------------------------------------------------------

    def create(self, path: Path) -> int:
        """Create a new file that only its owner may read or write, whatever the umask."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def write_some(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write the beginning of `buffers` at `offset`; return how many bytes were taken."""
        return os.pwritev(fd, buffers, offset)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write all of `buffers`, each flat and of bytes, at `offset`; return the offset behind."""
        waiting = [buffer for buffer in buffers if buffer.nbytes]
        waiting.reverse()
        while waiting:
            taken = self.write_some(fd, waiting[: -_PER_CALL_BUFFERS - 1 : -1], offset)
            if taken <= 0:
                raise OSError(errno.ENOSPC, "the disk takes no more bytes")
            offset += taken
            while waiting and taken >= waiting[-1].nbytes:
                taken -= waiting.pop().nbytes
            if taken:
                waiting[-1] = waiting[-1][taken:]
        return offset

    def fsync(self, fd: int) -> None:
        """Return once the file's bytes survive a loss of power. Never to be tried again: after an
        error the system may have dropped the bytes and report success."""
        if _FULLFSYNC is not None:
            try:
                fcntl.fcntl(fd, _FULLFSYNC)
                return
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Move a file within the volume, at once, over whatever was there."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def fsync_folder(self, folder: Path) -> None:
        """Return once the names in `folder` survive a loss of power."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._fsync_names(fd)
        finally:
            os.close(fd)

    def make_folder(self, folder: Path) -> None:
        """Make a folder, or take the one that is there, open to its owner only.

        Its parent must be there. Without a sync of the parent (`settle`) its name may be lost.
        """
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            if not folder.is_dir():
                raise
        if folder.stat().st_mode & 0o777 != 0o700:
            os.chmod(folder, 0o700)

    def settle(self, folder: Path) -> None:
        """Make a folder durably; costs a sync the first time in this process and nothing later.

        Not only when it was missing: a process that was killed may have left its name unsynced.
        """
        if folder not in self._settled:
            self.make_folder(folder)
            self.fsync_folder(folder.parent)
            self._settled.add(folder)

    # -- reading ------------------------------------------------------------------------------

    def open(self, path: Path) -> int:
        """Open a file for reading; a symbolic link is refused."""
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def read_some(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Fill the beginning of `buffer` from `offset`; return their number, 0 at the end."""
        return os.preadv(fd, [buffer], offset)

    def size_of(self, path: Path) -> int:
        return os.stat(path, follow_symlinks=False).st_size

    def names(self, folder: Path) -> list[str]:
        """Return the names in a folder, sorted."""
        return sorted(os.listdir(folder))

    def usage(self, folder: Path) -> DiskUsage:
        """Return how full the volume of `folder` is, as `df` counts it."""
        volume = os.statvfs(folder)
        block = volume.f_frsize
        return DiskUsage(
            used=(volume.f_blocks - volume.f_bfree) * block,
            free=volume.f_bavail * block,
            total=volume.f_blocks * block,
        )

    @staticmethod
    def _fsync_names(fd: int) -> None:
        for sync in (_full_sync, os.fsync):
            try:
                sync(fd)
                return
            except OSError as error:
                # Some network file systems cannot sync a folder; there is nothing more to do.
                if error.errno not in _CANNOT:
                    raise


def _full_sync(fd: int) -> None:
    if _FULLFSYNC is None:
        os.fsync(fd)
    else:
        fcntl.fcntl(fd, _FULLFSYNC)
