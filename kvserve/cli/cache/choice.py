"""Which place `kvserve cache` works at: the server that holds the data folder, else the folder.

Holds no state of its own; the place it gives holds the store's lock, or a connection.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kvserve.cli.cache.place import Checked, NotThere, Place, Progress, Refused
from kvserve.cli.cache.purpose import Purpose
from kvserve.config import Settings
from kvserve.store.folder import DataFolder
from kvserve.store.lock import Holder, read_holder


@asynccontextmanager
async def opened(
    settings: Settings, purpose: Purpose, *, api_key: str | None, tenant: str | None
) -> AsyncIterator[Place]:
    """Give the place where the store can be asked, for as long as it is needed.

    Raises Refused while another process starts or works on it, NotThere if there is none.
    """
    if api_key and tenant is not None:
        raise Refused("--tenant and --api-key both say whose conversations; give one")
    folder = settings.data_dir
    holder = _server_of(folder)
    if holder is None:
        if purpose is not Purpose.IMPORT:
            _check_there(folder)
        from kvserve.cli.cache.unlocked import unlocked

        async with unlocked(settings, purpose, api_key=api_key, tenant=tenant) as store:
            yield store
        return
    assert holder.url is not None
    if tenant is not None:
        raise Refused(
            f"the server at {holder.url} shows only the conversations of one key: give --api-key "
            "in place of --tenant, or stop it"
        )
    from kvserve.cli.cache.running import connected

    async with connected(holder.url, name_of(holder), api_key) as server:
        yield server


async def verified(settings: Settings, progress: Progress) -> Checked:
    """Verify the store, whether a server works on it or not. Raises as `opened`."""
    _server_of(settings.data_dir)
    _check_there(settings.data_dir)
    from kvserve.cli.cache.checking import verify

    return await verify(settings.data_dir, progress)


def name_of(holder: Holder) -> str:
    return "another process" if holder.pid is None else f"process {holder.pid}"


def _server_of(folder: Path) -> Holder | None:
    """Return the server that holds the folder. Raises Refused if another process does."""
    holder = read_holder(folder)
    if holder is not None and holder.url is None:
        raise Refused(
            f"{name_of(holder)} works on {folder}: a server that starts or stops, or another "
            "`kvserve cache`; try again when it is through"
        )
    return holder


def _check_there(folder: Path) -> None:
    if not DataFolder(folder).index.is_file():
        raise NotThere(f"there is no store in {folder}")
