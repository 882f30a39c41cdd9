"""The folders of the store, and what happens to whole files in them.

State: the names of files that could not be removed; they are tried again with the next ones.
Blocks: for worker threads, one at a time. Knows no index: what is to go or to be kept is decided by
others, after the index has let go of it.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from kvserve.store.disk import Disk
from kvserve.store.errors import StoreError
from kvserve.store.folder import DataFolder, is_file_name, is_shelf_name

logger = logging.getLogger(__name__)

_INDEX_PARTS = ("", "-wal", "-shm")
"""SQLite's files; the index first: without it a start makes a new one, whatever else is left."""


class Shelves:
    """The files of one data folder."""

    def __init__(self, disk: Disk, folder: DataFolder) -> None:
        self.disk = disk
        self.folder = folder
        self._strays: set[str] = set()

    def prepare(self) -> None:
        """Make all folders. Raises StoreError where that cannot be."""
        try:
            missing = [path for path in self.folder.path.parents if not path.exists()]
            for path in [*reversed(missing), *self.folder.folders()]:
                self.disk.settle(path)
        except OSError as error:
            raise StoreError(f"The data folder cannot be used: {error.strerror}.") from error

    def clear(self) -> int:
        """Remove drafts and staged uploads of a process that is gone; return how many."""
        num_removed = 0
        for folder in (self.folder.drafts, self.folder.imports):
            for name in self._names(folder):
                with suppress(OSError):
                    self.disk.unlink(folder / name)
                    num_removed += 1
        return num_removed

    def expect(self, file: str) -> None:
        """Note that a file of this name is being written: it is no stray any more."""
        self._strays.discard(file)

    def remove(self, files: Iterable[str]) -> int:
        """Remove files that the index does not know (any more); return how many went.

        One that cannot be removed now is tried again with the next, and swept at the next start.
        """
        waiting = self._strays | set(files)
        num_removed = 0
        for file in sorted(waiting):
            try:
                self.disk.unlink(self.folder.of(file))
                num_removed += 1
            except FileNotFoundError:
                pass
            except OSError as error:
                self._strays.add(file)
                logger.warning("a file could not be removed: %s", _name(error))
                continue
            self._strays.discard(file)
        return num_removed

    def set_aside(self, file: str) -> bool:
        """Move a bad file into quarantine; return whether it was there and could be moved."""
        target = self.folder.quarantine / file
        try:
            self.disk.rename(self.folder.of(file), target)
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning("a damaged file could not be moved: %s", _name(error))
            self._strays.add(file)
            return False
        return True

    def set_index_aside(self, stamp: str) -> None:
        """Move a damaged index with its log into quarantine, under a name with `stamp`."""
        index = self.folder.index
        for part in _INDEX_PARTS:
            with suppress(FileNotFoundError):
                target = self.folder.quarantine / f"index-{stamp}.sqlite3{part}"
                self.disk.rename(index.with_name(index.name + part), target)
        self.disk.fsync_folder(self.folder.path)

    def suspect_index(self) -> None:
        """Have the index made again at the next start."""
        with suppress(OSError):  # then the next start has to notice by itself
            self.disk.close(self.disk.create(self.folder.suspicion))

    def remove_index(self, path: Path) -> None:
        """Remove an index that never came into use."""
        for part in _INDEX_PARTS:
            with suppress(FileNotFoundError):
                self.disk.unlink(path.with_name(path.name + part))

    def shelves(self) -> list[Path]:
        """Return the folders in which there may be runs' files."""
        folder = self.folder.snapshots
        return [folder / name for name in self._names(folder) if is_shelf_name(name)]

    def on(self, shelf: Path) -> list[str]:
        """Return the names of runs' files in one of these folders."""
        names = self._names(shelf)
        return [name for name in names if is_file_name(name) and name[:2] == shelf.name]

    def files(self) -> list[str]:
        """Return the names of all runs' files."""
        return [name for shelf in self.shelves() for name in self.on(shelf)]

    def nbytes(self, file: str) -> int:
        """Return the size of a file, 0 if it is gone."""
        with suppress(OSError):
            return self.disk.size_of(self.folder.of(file))
        return 0

    def _names(self, folder: Path) -> Sequence[str]:
        try:
            return self.disk.names(folder)
        except FileNotFoundError:
            return []


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "unknown error")
