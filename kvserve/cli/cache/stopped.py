"""The store of a data folder that no server works on, opened for as long as a command takes.

State: the open store, and with it the lock. All tenants' conversations can be seen here, so that an
id alone may mean several; then the person is asked to say whose.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

from kvserve.chat.directory import info_of
from kvserve.chat.holdings import holding, message_cuts
from kvserve.chat.records import from_stored
from kvserve.cli.cache import words
from kvserve.cli.cache.checking import of_index, problem_of
from kvserve.cli.cache.file import write_whole
from kvserve.cli.cache.place import (
    Detail,
    Item,
    Line,
    Listing,
    Mended,
    Message,
    NotThere,
    Problem,
    Progress,
    Refused,
    Step,
)
from kvserve.cli.cache.taking_in import take_in
from kvserve.store.errors import IndexDamaged
from kvserve.store.records import ConversationHead
from kvserve.store.runs import Kin, PathUsage
from kvserve.store.store import Store
from kvserve.store.upkeep import Fault, UpkeepReport
from kvserve.store.upkeep import Progress as UpkeepProgress


class StoppedStore:
    """See `kvserve.cli.cache.place.Place`. `tenants` are those that can be seen, None for all."""

    def __init__(
        self, store: Store, tenants: frozenset[str] | None, damage: IndexDamaged | None
    ) -> None:
        self._store = store
        self._tenants = tenants
        self._damage = damage

    async def ls(self) -> Listing:
        now = datetime.now(UTC)
        heads = await self._heads()
        usages = await self._store.disk_usage_of([(head.tenant, head.id) for head in heads])
        stems = Counter(map(_stem, heads))
        items = tuple(
            _item(head, usages.get((head.tenant, head.id)), stems[_stem(head)], now)
            for head in heads
        )
        return Listing(items, self._store.stats()["stored_bytes"])

    async def show(self, conversation_id: str) -> Detail:
        head = await self._head(conversation_id)
        key = (head.tenant, head.id)
        stored = await self._store.find(*key)
        if stored is None:
            raise NotThere(f"there is no conversation {head.id}")
        usage = (await self._store.disk_usage_of([key])).get(key)
        cuts = message_cuts(from_stored(stored), holding(None, usage))
        messages = tuple(
            Message(cut.message, cut.role, cut.start, cut.end, cut.tier, cut.bytes) for cut in cuts
        )
        # Chats of one template begin alike; branches share a message at least.
        shared = cuts[0].end if cuts else 1
        kin = await self._store.catalog.kin(*key, shared)
        item = _item(head, usage, await self._num_branches(head), datetime.now(UTC))
        return Detail(item, messages, tuple(map(_line, kin)))

    async def repair(self, progress: Progress) -> Mended:
        faults: list[Fault] = []

        def note(step: UpkeepProgress) -> None:
            progress(step.done_nbytes, step.total_nbytes)
            faults.extend(step.faults)

        report = await self._store.repair(note)
        problems = [] if self._damage is None else [of_index(self._damage)]
        problems += [await problem_of(self._store.catalog, fault) for fault in faults]
        return _mended(report, tuple(problems))

    async def gc(self) -> Mended:
        return _mended(await self._store.gc())

    async def pin(self, conversation_id: str, ttl_s: float | None) -> datetime | None:
        head = await self._head(conversation_id)
        until = None if ttl_s is None else datetime.now(UTC) + timedelta(seconds=ttl_s)
        await self._store.set_flags(head.tenant, head.id, pinned=True, pinned_until=until)
        return until

    async def unpin(self, conversation_id: str) -> None:
        head = await self._head(conversation_id)
        await self._store.set_flags(head.tenant, head.id, pinned=False, pinned_until=None)

    async def rm(self, conversation_id: str) -> None:
        head = await self._head(conversation_id)
        await self._store.delete(head.tenant, head.id)

    async def export(self, conversation_id: str, file: Path, progress: Progress) -> int:
        head = await self._head(conversation_id)
        export = await self._store.export(head.tenant, head.id)
        return await write_whole(file, export, export.nbytes, progress)

    async def import_(self, file: Path, conversation_id: str | None, progress: Progress) -> Item:
        head = await take_in(self._store, file, self._newcomers_tenant(), conversation_id, progress)
        usage = await self._store.disk_usage_of([(head.tenant, head.id)])
        return _item(
            head, usage.get((head.tenant, head.id)), await self._num_branches(head), head.used_at
        )

    async def _num_branches(self, head: ConversationHead) -> int:
        return sum(_stem(other) == _stem(head) for other in await self._store.heads())

    def _newcomers_tenant(self) -> str:
        if self._tenants is None:
            return ""
        if len(self._tenants) > 1:
            listed = ", ".join(sorted(map(words.tenant, self._tenants)))
            raise Refused(f"--tenant means several here: {listed}")
        [tenant] = self._tenants
        return tenant

    async def _heads(self) -> list[ConversationHead]:
        heads = await self._store.heads()
        return [head for head in heads if self._tenants is None or head.tenant in self._tenants]

    async def _head(self, conversation_id: str) -> ConversationHead:
        """Return the one conversation of this id. Raises NotThere, Refused if there are several."""
        found = [head for head in await self._heads() if head.id == conversation_id]
        if not found:
            raise NotThere(f"there is no conversation {words.printable(conversation_id)}")
        if len(found) > 1:
            tenants = ", ".join(sorted(words.tenant(head.tenant) for head in found))
            raise Refused(
                f"{len(found)} tenants have a conversation {conversation_id}: {tenants}; "
                "say whose with --tenant"
            )
        return found[0]


def _mended(report: UpkeepReport, problems: tuple[Problem, ...] = ()) -> Mended:
    return Mended(
        problems=problems,
        quarantined_files=report.quarantined,
        restored_rows=report.restored,
        ended_conversations=report.expired,
        removed_files=report.removed_files,
        freed_bytes=report.freed_nbytes,
        left=report.left,
    )


def _stem(head: ConversationHead) -> tuple[str, bytes, bytes]:
    return head.tenant, head.namespace, head.stem


def _item(head: ConversationHead, usage: PathUsage | None, branches: int, now: datetime) -> Item:
    info = info_of(head, holding(None, usage), branches, now)
    return Item(tenant=head.tenant, **asdict(info))


def _line(kin: Kin) -> Line:
    return Line(
        kin.id,
        kin.used_at,
        tuple(
            Step(at.run_id, at.start, at.until, at.nbytes, "disk" if at.held else "none")
            for at in kin.path
        ),
    )
