"""The file of an export, on the user's own disk. Stateless; blocks.

It has its name only once it is whole and durable: until then it is `NAME.part` beside it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

from kvserve.cli.cache.place import Progress, Refused

BLOCK_NBYTES = 1 << 20


def check_target(file: Path, *, force: bool) -> None:
    """Raise Refused if `file` must not, or cannot, be written."""
    if file.is_dir() or not file.parent.is_dir():
        raise Refused(f"{file}: {'is a folder' if file.is_dir() else 'its folder does not exist'}")
    if file.exists() and not force:
        raise Refused(f"{file} exists already; --force writes over it")


async def write_whole(
    file: Path, blocks: AsyncIterable[bytes], total: int | None, progress: Progress
) -> int:
    """Write all of `blocks` to `file` and return its size; on an error nothing is left of it.

    Only its owner may read it: it tells what the conversation was about.
    """
    part = file.with_name(file.name + ".part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as draft:
            done = 0
            async for block in blocks:
                draft.write(block)
                done += len(block)
                progress(done, total)
            draft.flush()
            os.fchmod(fd, 0o600)
            os.fsync(fd)
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return done


async def blocks_of(file: Path, total: int, progress: Progress) -> AsyncIterator[bytes]:
    """Yield the file's bytes."""
    done = 0
    with file.open("rb") as whole:
        while block := whole.read(BLOCK_NBYTES):
            yield block
            done += len(block)
            progress(done, total)
