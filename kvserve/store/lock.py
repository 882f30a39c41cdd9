"""One process at a time works on a data folder.

State: an open file, `lock` in the folder, locked with `flock` for as long as the process lives:
the system lets go of it however the process ends, `kill -9` included. The file says who holds it,
`{"pid": ..., "url": ...}`, for the words of a refusal and for programs that look for the server
of a folder. It stays when the lock is released, because a new file under the same name could be
locked beside the old one. Owned by who opened it; does not wait for the lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kvserve.store.errors import StoreError, StoreLocked

_NAME = "lock"
_TRIES, _PAUSE_S = 5, 0.02  # one who only looks, in `read_holder`, holds it for a moment too
_LIMIT_NBYTES = 4096
_HELD_BY_OTHERS = (errno.EWOULDBLOCK, errno.EACCES)


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that works on a folder, as far as it said so; `url` of its server."""

    pid: int | None
    url: str | None


class StoreLock:
    """The right to work on a folder. Release it, or end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, folder: Path) -> Self:
        """Take the lock. Raises StoreLocked, and StoreError where folders cannot be locked."""
        try:
            descriptor = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(
                f"The lock file of the data folder cannot be opened: {error.strerror}."
            ) from error
        try:
            if not _locked(descriptor):
                raise StoreLocked(in_words(_read(descriptor)))
            lock = cls(descriptor)
            lock.announce(None)
        except BaseException:
            os.close(descriptor)
            raise
        return lock

    def announce(self, url: str | None) -> None:
        """Write where this process can be reached."""
        _write(self._open, json.dumps({"pid": os.getpid(), "url": url}).encode())

    def release(self) -> None:
        """Let go; a second time does nothing."""
        if self._descriptor is not None:
            _write(self._descriptor, b"")
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def _open(self) -> int:
        assert self._descriptor is not None, "the lock was released"
        return self._descriptor


def read_holder(folder: Path) -> Holder | None:
    """Return who works on the folder, None if nobody does (any more)."""
    try:
        descriptor = os.open(folder / _NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return None if _try(descriptor, fcntl.LOCK_SH) else _read(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    for _ in range(_TRIES - 1):
        if _try(descriptor, fcntl.LOCK_EX):
            return True
        time.sleep(_PAUSE_S)
    return _try(descriptor, fcntl.LOCK_EX)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_BY_OTHERS:
            return False
        raise StoreError(
            f"The data folder cannot be locked ({error.strerror}). Choose one on a local disk "
            f"with --data-dir."
        ) from error
    return True


def _write(descriptor: int, data: bytes) -> None:
    os.pwrite(descriptor, data, 0)
    os.ftruncate(descriptor, len(data))


def _read(descriptor: int) -> Holder:
    try:
        said = json.loads(os.pread(descriptor, _LIMIT_NBYTES, 0))
        pid, url = said.get("pid"), said.get("url")
    except (ValueError, AttributeError):
        return Holder(None, None)
    return Holder(pid if isinstance(pid, int) else None, url if isinstance(url, str) else None)


def in_words(holder: Holder) -> str:
    """Return the refusal that a second process is given."""
    who = "Another kvserve" if holder.pid is None else f"Another kvserve, process {holder.pid},"
    where = "" if holder.url is None else f" and serves {holder.url}"
    return (
        f"{who} works on this data folder{where}. Stop it first, or choose another folder "
        f"with --data-dir."
    )
