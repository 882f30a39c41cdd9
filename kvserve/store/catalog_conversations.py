"""Conversations, their messages and their roots in the index.

State: none; functions over a connection, called by `kvserve.store.catalog` inside a transaction.
A conversation is a name for a position in the tree of runs; putting one verifies that the tree
holds its tokens, token by token. A turn of a growing conversation writes the rows of its new
messages only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypedDict

from sqlalchemy import (
    Connection,
    RowMapping,
    Select,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as upsert

from kvserve.core.identity import ModelIdentity
from kvserve.core.types import TokenIds
from kvserve.store.catalog_prune import among, prune
from kvserve.store.catalog_walk import find_root, path_of, tokens_of, walk
from kvserve.store.records import ConversationHead, StoredConversation, StoredMessage
from kvserve.store.runs import PathRun
from kvserve.store.tables import conversations, identities, messages, roots, runs


class Changes(TypedDict, total=False):
    """What may be changed of a conversation without a turn."""

    title: str | None
    saved: bool
    pinned: bool
    pinned_until: datetime | None
    expires_at: datetime | None


def get_root(connection: Connection, identity: ModelIdentity, namespace: bytes) -> int:
    """Return the id of a root, which is made where it is not there."""
    digest = identity.digest()
    found = find_root(connection, digest, namespace)
    if found is not None:
        return found
    connection.execute(
        upsert(identities).values(digest=digest, json=identity.to_json()).on_conflict_do_nothing()
    )
    identity_id = select(identities.c.id).where(identities.c.digest == digest).scalar_subquery()
    values = {"identity_id": identity_id, "namespace": namespace}
    return int(connection.execute(insert(roots).values(values).returning(roots.c.id)).scalar_one())


def reserve(connection: Connection, root_id: int, head: ConversationHead) -> int:
    """Return the id of a conversation's row; a new one is empty until `put` completes it."""
    found: int | None = connection.scalar(
        select(conversations.c.id).where(named(head.tenant, head.id))
    )
    if found is not None:
        return found
    values = _columns(head) | {"tenant": head.tenant, "name": head.id, "root_id": root_id}
    values |= {"num_tokens": 0, "num_messages": 0, "tools_digest": b"", "template_digest": b""}
    row = connection.execute(insert(conversations).values(values).returning(conversations.c.id))
    return int(row.scalar_one())


def put(connection: Connection, root_id: int, whole: StoredConversation) -> None:
    """Make this the record of its name. Raises LookupError unless all its tokens are known."""
    head = whole.head
    if head.num_tokens != len(whole.token_ids) or head.num_messages != len(whole.messages):
        raise ValueError("a conversation's head counts its tokens and messages")
    found = walk(connection, root_id, head.namespace, whole.token_ids)
    if found.path.num_tokens != head.num_tokens:
        raise LookupError(f"only {found.path.num_tokens} of {head.num_tokens} tokens are known")
    conversation_id = reserve(connection, root_id, head)
    values = _columns(head) | {
        "root_id": root_id,
        "tip_id": found.parent_id,
        "tools_digest": whole.tools_digest,
        "template_digest": whole.template_digest,
    }
    connection.execute(
        update(conversations).where(conversations.c.id == conversation_id).values(values)
    )
    _put_messages(connection, conversation_id, whole.messages)


def _put_messages(connection: Connection, owner: int, new: Sequence[StoredMessage]) -> None:
    known = _messages_of(connection, owner)
    changed = [
        {"conversation_id": owner, "position": at, "role": m.role, "digest": m.digest, "end": m.end}
        for at, m in enumerate(new)
        if at >= len(known) or known[at] != m
    ]
    if len(known) > len(new):
        behind = messages.c.position >= len(new)
        connection.execute(delete(messages).where(messages.c.conversation_id == owner, behind))
    if changed:
        row = upsert(messages)
        replaced = {name: row.excluded[name] for name in ("role", "digest", "end")}
        connection.execute(row.on_conflict_do_update(set_=replaced), changed)


def _messages_of(connection: Connection, owner: int) -> list[StoredMessage]:
    rows = connection.execute(
        select(messages.c.role, messages.c.digest, messages.c.end)
        .where(messages.c.conversation_id == owner)
        .order_by(messages.c.position)
    )
    return [StoredMessage(*row) for row in rows]


def heads(connection: Connection, *conditions: Any) -> list[ConversationHead]:
    """Return the conversations for which all conditions hold, in order of their making."""
    identity: dict[str, ModelIdentity] = {}  # few; reading one for each row would take longest
    found = []
    for row in connection.execute(_HEADS.where(*conditions)).mappings():
        text = row["json"]
        if text not in identity:
            identity[text] = ModelIdentity.from_json(text)
        found.append(_head(row, identity[text]))
    return found


def find(connection: Connection, tenant: str, name: str) -> StoredConversation | None:
    """Return a conversation whole, its tokens joined from the runs."""
    row = connection.execute(_WHOLE.where(named(tenant, name))).mappings().one_or_none()
    if row is None:
        return None
    token_ids: TokenIds = tokens_of(connection, row["tip_id"], row["num_tokens"])
    return StoredConversation(
        head=_head(row, ModelIdentity.from_json(row["json"])),
        tools_digest=row["tools_digest"],
        template_digest=row["template_digest"],
        messages=_messages_of(connection, row["id"]),
        token_ids=token_ids,
    )


def change(connection: Connection, tenant: str, name: str, changes: Changes) -> bool:
    """Change the given columns; return whether there is such a conversation."""
    statement = update(conversations).where(named(tenant, name)).values(**changes)
    return bool(connection.execute(statement).rowcount)


def touch(connection: Connection, used: Mapping[tuple[str, str], datetime]) -> None:
    """Note that conversations were used at a time, and so were the runs in which they end.

    Runs above a tip learn of it when the tip goes: only leaves are ever compared by their use.
    """
    rows = [{"of": key[0], "called": key[1], "at": at} for key, at in used.items()]
    if not rows:
        return
    mine = named(bindparam("of"), bindparam("called"))
    at = bindparam("at", type_=conversations.c.used_at.type)
    tip = select(conversations.c.tip_id).where(mine).scalar_subquery()
    later = func.max(conversations.c.used_at, at)
    connection.execute(update(conversations).where(mine).values(used_at=later), rows)
    use = {"used_at": func.max(runs.c.used_at, at), "hits": runs.c.hits + 1}
    connection.execute(update(runs).where(runs.c.id == tip).values(use), rows)


def expired(connection: Connection, now: datetime) -> list[tuple[str, str]]:
    """Return the (tenant, id) of the conversations whose end has come."""
    query = select(conversations.c.tenant, conversations.c.name)
    rows = connection.execute(query.where(conversations.c.expires_at <= now))
    return [(row.tenant, row.name) for row in rows]


def path(connection: Connection, tenant: str, name: str) -> tuple[PathRun, ...] | None:
    """Return the runs on a conversation's path; None if there is no such conversation."""
    query = select(conversations.c.tip_id, conversations.c.num_tokens)
    row = connection.execute(query.where(named(tenant, name))).one_or_none()
    return None if row is None else path_of(connection, row.tip_id, row.num_tokens)


def drop_roots(connection: Connection) -> None:
    """Delete roots and identities that nothing is below any more."""
    run, talk, root = runs.alias(), conversations.alias(), roots.alias()
    used = or_(
        select(run.c.id).where(run.c.root_id == roots.c.id, run.c.parent_id.is_(None)).exists(),
        select(talk.c.id).where(talk.c.root_id == roots.c.id).exists(),
    )
    connection.execute(delete(roots).where(~used))
    named_here = select(root.c.id).where(root.c.identity_id == identities.c.id).exists()
    connection.execute(delete(identities).where(~named_here))


def remove(connection: Connection, tenant: str, name: str) -> list[str] | None:
    """Delete a conversation and what only it used; return the files to remove, None if unknown.

    That is: the runs on its path and those that it wrote on branches since left, as far as no
    other conversation's path and no other run needs them. Runs on its path that another
    conversation wrote stay, as cache of that one.
    """
    row = connection.execute(_TIP.where(named(tenant, name))).one_or_none()
    if row is None:
        return None
    connection.execute(delete(conversations).where(conversations.c.id == row.id))
    return _leave(connection, row)


def empty(connection: Connection, tenant: str, name: str) -> list[str] | None:
    """Do as `remove` does, but keep the name, so that the end of its time can be told."""
    row = connection.execute(_TIP.where(named(tenant, name))).one_or_none()
    if row is None:
        return None
    _clear(connection, row.id)
    return _leave(connection, row)


def reset(connection: Connection, tenant: str, name: str) -> None:
    """Take all but its name from a conversation, if it is known.

    The row stays, as the writer of its runs: whoever deletes the name later deletes them too.
    """
    row = connection.execute(_TIP.where(named(tenant, name))).one_or_none()
    if row is not None:
        _clear(connection, row.id, saved=False, pinned=False, pinned_until=None, expires_at=None)


def forget_reset(connection: Connection) -> None:
    """Delete the rows of conversations that were reset and not written since."""
    nothing = (conversations.c.num_tokens == 0) & (conversations.c.num_messages == 0)
    lasting = conversations.c.expires_at.is_(None)  # else the name tells that its time is over
    connection.execute(delete(conversations).where(nothing & lasting))


def _clear(connection: Connection, conversation_id: int, **flags: Any) -> None:
    nothing = {"tip_id": None, "num_tokens": 0, "num_messages": 0, "title": None, **flags}
    mine = conversations.c.id == conversation_id
    connection.execute(update(conversations).where(mine).values(nothing))
    connection.execute(delete(messages).where(messages.c.conversation_id == conversation_id))


def _leave(connection: Connection, row: Any) -> list[str]:
    """Delete the runs that a conversation leaves behind, whose tip is set free already."""
    path = [at.run.id for at in path_of(connection, row.tip_id, row.num_tokens)]
    alive = select(conversations.c.id).where(conversations.c.id == runs.c.writer_id).exists()
    own = connection.scalars(
        select(runs.c.id).where(
            or_(runs.c.writer_id == row.id, runs.c.id.in_(among(path)) & ~alive)
        )
    ).all()
    return prune(connection, own, with_files=True)


def named(tenant: Any, name: Any) -> Any:
    """Return the condition for one conversation."""
    return (conversations.c.tenant == tenant) & (conversations.c.name == name)


def _columns(head: ConversationHead) -> dict[str, Any]:
    return {
        "num_tokens": head.num_tokens,
        "num_messages": head.num_messages,
        "model": head.model,
        "title": head.title,
        "saved": head.saved,
        "pinned": head.pinned,
        "pinned_until": head.pinned_until,
        "expires_at": head.expires_at,
        "created_at": head.created_at,
        "used_at": head.used_at,
        "tip_digest": head.tip,
        "stem_digest": head.stem,
    }


def _head(row: RowMapping, identity: ModelIdentity) -> ConversationHead:
    return ConversationHead(
        tenant=row["tenant"],
        id=row["name"],
        namespace=row["namespace"],
        model=row["model"],
        identity=identity,
        title=row["title"],
        num_tokens=row["num_tokens"],
        num_messages=row["num_messages"],
        tip=row["tip_digest"],
        stem=row["stem_digest"],
        saved=row["saved"],
        pinned=row["pinned"],
        pinned_until=row["pinned_until"],
        expires_at=row["expires_at"],
        created_at=row["created_at"],
        used_at=row["used_at"],
    )


def _query(columns: Iterable[Any]) -> Select[Any]:
    return (
        select(*columns, roots.c.namespace, identities.c.json)
        .select_from(conversations)
        .join(roots, roots.c.id == conversations.c.root_id)
        .join(identities)
        .order_by(conversations.c.id)
    )


_WHOLE = _query(conversations.c)
_HEADS = _query(c for c in conversations.c if c.name not in ("tools_digest", "template_digest"))
_TIP = select(conversations.c.id, conversations.c.tip_id, conversations.c.num_tokens)
