"""Opens the store of a data folder that nobody works on, and says in words why it cannot.

State: the open store, and with it the lock, for as long as the place is in use.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.datastructures import Headers

from kvserve.api.identity import tenant_of
from kvserve.cli.cache import words
from kvserve.cli.cache.place import NotThere, Refused, Unusable
from kvserve.cli.cache.purpose import Purpose
from kvserve.cli.cache.stopped import StoppedStore
from kvserve.config import Settings
from kvserve.core.errors import Damaged, KvserveError, NotFound
from kvserve.store.errors import IndexDamaged, IndexFailed, SnapshotDamaged
from kvserve.store.folder import DataFolder
from kvserve.store.migrate import is_current
from kvserve.store.offload import offload
from kvserve.store.store import Store


@asynccontextmanager
async def unlocked(
    settings: Settings, purpose: Purpose, *, api_key: str | None, tenant: str | None
) -> AsyncIterator[StoppedStore]:
    """Give the store of a data folder, seen as a whole, or as one tenant's.

    A damaged index is made again for `Purpose.REPAIR` only, since that loses names.
    """
    try:
        damage = await _damage(settings.data_dir)
        if damage is not None and purpose is not Purpose.REPAIR:
            raise Unusable(
                f"the index is damaged ({damage}): `kvserve cache repair` makes it again from the "
                "snapshots, which keeps all state and loses the names of conversations"
            )
        store = await Store.open(settings.data_dir, identity=None, limits=settings.disk_limits())
        try:
            tenants = await _tenants(store, api_key, tenant)
            yield StoppedStore(store, tenants, damage)
        finally:
            await store.aclose()
    except NotFound as error:
        raise NotThere(error.message) from error
    except Damaged as error:
        raise Unusable(error.message) from error
    except KvserveError as error:
        raise Refused(error.message) from error
    except SnapshotDamaged as error:
        raise Unusable(f"a file is damaged: {error}") from error
    except IndexFailed as error:
        raise Refused(f"the index cannot be used: {error}") from error


async def _damage(folder: Path) -> IndexDamaged | None:
    index = DataFolder(folder).index
    try:
        if index.is_file():
            await offload(is_current, index)
    except IndexDamaged as error:
        return error
    return None


async def _tenants(store: Store, api_key: str | None, prefix: str | None) -> frozenset[str] | None:
    """Return the tenants that are meant. Raises NotThere for a prefix of none."""
    if api_key:
        return frozenset({tenant_of(Headers({"x-api-key": api_key}))})
    if prefix is None:
        return None
    if prefix == words.tenant(""):
        return frozenset({""})
    known = {head.tenant for head in await store.heads() if head.tenant}
    meant = frozenset(tenant for tenant in known if tenant.startswith(prefix))
    if not meant:
        raise NotThere(f"no tenant begins with {words.printable(prefix)}")
    return meant
