"""The index of the store: every question and every change, as one transaction each.

State: the database `index.sqlite3`, through `kvserve.store.database`; owned by the event loop
thread. This class and the `catalog_*` modules, which hold the queries, are the only SQL. It names
files and never touches one: on a write the file is durable before its row is, and a deletion
returns the names of files to remove afterwards. Takes times as arguments, reads no clock.

All methods raise IndexFailed when the database cannot be read or written, IndexDamaged when it is
not whole. Writes change all or nothing, also when their caller is cancelled.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Unpack

from sqlalchemy import Connection

from kvserve.core.identity import ModelIdentity
from kvserve.core.types import TokenIds
from kvserve.store import catalog_conversations as talks
from kvserve.store import catalog_kin as kinship
from kvserve.store import catalog_prune as leaves
from kvserve.store import catalog_repair as repair
from kvserve.store import catalog_runs as tree
from kvserve.store import catalog_space as space
from kvserve.store import catalog_walk as ways
from kvserve.store.catalog_conversations import Changes
from kvserve.store.catalog_holdings import holdings
from kvserve.store.database import Database
from kvserve.store.guards import Holding
from kvserve.store.records import ConversationHead, StoredConversation
from kvserve.store.runs import (
    Commit,
    Found,
    Kin,
    PathRun,
    PathUsage,
    Run,
    RunRecord,
    Totals,
    Walk,
)
from kvserve.store.tables import RunState

Key = tuple[str, str]
"""(tenant, conversation id)."""

_CHUNK = 200  # some milliseconds of the event loop


class Catalog:
    """The index at `path`, whose schema is current (`kvserve.store.migrate`)."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)

    async def aclose(self) -> None:
        await self.database.aclose()

    # Conversations and paths

    async def walk(self, identity: ModelIdentity, namespace: bytes, token_ids: TokenIds) -> Walk:
        """Return how far the tree of this identity and namespace agrees with a prompt."""

        def work(connection: Connection) -> Walk:
            root_id = ways.find_root(connection, identity.digest(), namespace)
            return ways.walk(connection, root_id, namespace, token_ids)

        return await self.database.read(work)

    async def heads(self) -> list[ConversationHead]:
        """Return all conversations, without tokens and messages, in order of their making."""
        return await self.database.read(talks.heads)

    async def find(self, tenant: str, id: str) -> StoredConversation | None:
        """Return a conversation whole."""
        return await self.database.read(lambda c: talks.find(c, tenant, id))

    async def path(self, tenant: str, id: str) -> tuple[PathRun, ...] | None:
        """Return the runs on a conversation's path, from the root down; None if unknown."""
        return await self.database.read(lambda c: talks.path(c, tenant, id))

    async def whole(
        self, tenant: str, id: str
    ) -> tuple[StoredConversation, tuple[PathRun, ...]] | None:
        """Return a conversation whole with the runs on its path, both as of one moment."""

        def work(connection: Connection) -> tuple[StoredConversation, tuple[PathRun, ...]] | None:
            found = talks.find(connection, tenant, id)
            return None if found is None else (found, talks.path(connection, tenant, id) or ())

        return await self.database.read(work)

    async def kin(self, tenant: str, id: str, since: int) -> tuple[Kin, ...]:
        """Return the tenant's conversations that share their first `since` tokens with this one.

        It is among them unless it is unknown or shorter; `since` is at least 1.
        """
        return await self.database.read_apart(lambda c: kinship.kin(c, tenant, id, since))

    async def users_of(self, run_id: int) -> list[Key]:
        """Return the conversations on whose path a run lies."""
        return await self.database.read(lambda c: kinship.users(c, run_id))

    async def commit(self, change: Commit) -> tuple[int, ...]:
        """Make one write known and return the ids of its new runs.

        Raises TreeChanged when the runs do not fit the tree as it is now (walk again), LookupError
        when the conversation's tokens are not all known afterwards.
        """
        return await self.database.write(lambda c: _commit(c, change))

    async def put(self, conversation: StoredConversation) -> None:
        """Keep a conversation whose tokens are all known. Raises LookupError where they are not."""

        def work(connection: Connection) -> None:
            head = conversation.head
            root_id = talks.get_root(connection, head.identity, head.namespace)
            talks.put(connection, root_id, conversation)

        await self.database.write(work)

    async def change(self, tenant: str, id: str, **changes: Unpack[Changes]) -> bool:
        """Change flags, title or expiry; return whether there is such a conversation."""
        return await self.database.write(lambda c: talks.change(c, tenant, id, changes))

    async def touch(self, used: Mapping[Key, datetime]) -> None:
        """Note when conversations were used last; older times change nothing."""
        await self.database.write(lambda c: talks.touch(c, used))

    async def delete(self, tenant: str, id: str) -> list[str] | None:
        """Delete a conversation and what only it used; return the files to remove.

        None if there is no such conversation.
        """
        return await self.database.write(lambda c: talks.remove(c, tenant, id))

    async def empty(self, tenant: str, id: str) -> list[str] | None:
        """Do as `delete` does, but keep the name, so that the end of its time can be told."""
        return await self.database.write(lambda c: talks.empty(c, tenant, id))

    async def reset(self, tenant: str, id: str) -> None:
        """Take all but its name from a conversation; what it wrote stays, in nobody's use."""
        await self.database.write(lambda c: talks.reset(c, tenant, id))

    async def forget_reset(self) -> None:
        """Delete the names of conversations that were reset and never written again."""
        await self.database.write(talks.forget_reset)

    async def expired(self, now: datetime) -> list[Key]:
        """Return the conversations whose end has come."""
        return await self.database.read(lambda c: talks.expired(c, now))

    # Room

    async def totals(self, now: datetime) -> Totals:
        """Return the counts over the whole index."""
        return await self.database.read(lambda c: space.totals(c, now))

    async def usage(self, keys: Sequence[Key]) -> dict[Key, PathUsage]:
        """Return what conversations hold on disk; unknown ones, and empty ones, are left out.

        Not one state of the index throughout: SQLite limits how many can be asked for at once.
        """
        found: dict[Key, PathUsage] = {}
        # Of a page of long chats these are ten thousand rows.
        read = self.database.read if len(keys) == 1 else self.database.read_apart
        for at in range(0, len(keys), _CHUNK):
            chunk = keys[at : at + _CHUNK]
            found |= await read(lambda c, chunk=chunk: space.usage(c, chunk))  # type: ignore[misc]
        return found

    async def holdings(self, now: datetime) -> list[Holding]:
        """Return all runs as eviction sees them."""
        return await self.database.read_apart(lambda c: holdings(c, now))

    async def evict(self, run_ids: Iterable[int]) -> list[str]:
        """Forget the files of these runs; return their names, to be removed afterwards."""
        return await self.database.write(lambda c: leaves.let_go(c, run_ids, RunState.EVICTED))

    async def quarantine(self, run_id: int) -> str | None:
        """Forget the file of a run that is bad; return its name, None if it has none."""
        names = await self.database.write(
            lambda c: leaves.let_go(c, [run_id], RunState.QUARANTINED)
        )
        return names[0] if names else None

    async def distrust(self, run_id: int) -> dict[int, str]:
        """Forget the files of a run and of all below it; return their names by run."""

        def work(connection: Connection) -> dict[int, str]:
            files = leaves.files_from(connection, run_id)
            leaves.let_go(connection, files, RunState.QUARANTINED)
            return files

        return await self.database.write(work)

    async def collect(self, *, before: datetime | None = None) -> list[str]:
        """Delete runs on no conversation's path; return the files to remove.

        With `before`, those with a file only if unused since then.
        """

        def work(connection: Connection) -> list[str]:
            ids = space.unreferenced(connection, before)
            names = leaves.prune(connection, ids, with_files=True)
            talks.drop_roots(connection)
            return names

        return await self.database.write(work)

    # Looking through all of it

    async def runs(self) -> AsyncIterator[list[Run]]:
        """Yield all runs, some hundred at a time, by id; not one state of the index throughout."""
        last = 0
        while chunk := await self.database.read(
            lambda c, last=last: repair.runs_after(c, last, _CHUNK)  # type: ignore[misc]
        ):
            yield chunk
            last = chunk[-1].id

    async def known_files(self, names: Iterable[str]) -> set[str]:
        """Return those of the names that a run has as its file."""
        return await self.database.read(lambda c: repair.known_files(c, names))

    async def record(self, run_id: int) -> RunRecord | None:
        """Return all that is known of a run, to compare with its file."""
        return (await self.records([run_id])).get(run_id)

    async def records(self, run_ids: Collection[int]) -> dict[int, RunRecord]:
        """Return the same of at most some hundred runs; unknown ones are left out."""
        return await self.database.read(lambda c: repair.records(c, run_ids))

    async def check(self) -> list[str]:
        """Return what is wrong with the index, in words: SQLite's own checks and the tree's."""
        return await self.database.read_apart(repair.check)

    async def restore(self, found: Found, now: datetime) -> int | None:
        """Make a run known again from what its file says of itself; return its id.

        Parents go first. None if its place in the tree is not known or taken by other tokens.
        """
        return await self.database.write(lambda c: repair.restore(c, found, now))


def _commit(connection: Connection, change: Commit) -> tuple[int, ...]:
    root_id = talks.get_root(connection, change.identity, change.namespace)
    whole, writer_id = change.conversation, None
    if whole is not None:
        if (whole.head.identity, whole.head.namespace) != (change.identity, change.namespace):
            raise ValueError("a conversation is written below its own root")
        writer_id = talks.reserve(connection, root_id, whole.head)
    for fill in change.fills:
        tree.fill_run(connection, fill, writer_id=writer_id, now=change.now)
    parent_id, added = change.parent_id, []
    for run in change.new_runs:
        parent_id = tree.add_run(
            connection, root_id, parent_id, run, writer_id=writer_id, now=change.now
        )
        added.append(parent_id)
    if whole is not None:
        talks.put(connection, root_id, whole)
    if change.nbytes:
        space.note_written(connection, change.nbytes, change.now)
    return tuple(added)
