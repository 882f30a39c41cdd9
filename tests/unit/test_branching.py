"""Forks and rollbacks as values: what stays, what is shared, and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from kvserve.chat.branching import fork, rollback
from kvserve.chat.conversations import Conversation
from kvserve.chat.messages import identity_chain
from kvserve.core.errors import InvalidRequest
from kvserve.core.types import Cut
from tests.unit.chat_fixtures import chat
from tests.unit.snapshot_fixtures import IDENTITY

THEN = datetime(2026, 1, 1, tzinfo=UTC)
NOW = THEN + timedelta(hours=1)
MESSAGES = chat("one", "two", "three", "four")  # behind a system prompt
ENDS = (3, 6, 10, 14, 20)


def record(*, hidden: tuple[int, ...] = (), num_messages: int = 5) -> Conversation:
    """Return five messages in twenty tokens; the ends of the `hidden` are not known."""
    messages = MESSAGES[:num_messages]
    return Conversation(
        tenant="t",
        id="c",
        namespace=b"n",
        model="tiny",
        identity=IDENTITY,
        token_ids=np.arange(ENDS[num_messages - 1], dtype=np.uint32),
        chain=identity_chain(messages),
        roles=tuple(message["role"] for message in messages),
        cuts=tuple(Cut(ENDS[i], i) for i in range(num_messages) if i not in hidden),
        tools_digest=b"tools",
        template_digest=b"template",
        created_at=THEN,
        used_at=THEN,
        title="Title",
        saved=True,
        pinned=True,
        pinned_until=NOW,
        expires_at=NOW,
    )


def check_is_prefix(part: Conversation, last: int) -> None:
    assert part.token_ids.tolist() == list(range(ENDS[last]))
    assert part.token_ids.base is None or last == 4, "a view keeps all tokens alive"
    assert part.chain == identity_chain(MESSAGES[: last + 1])
    assert part.roles == record().roles[: last + 1]
    assert part.cuts == record().cuts[: last + 1]
    assert (part.tools_digest, part.template_digest) == (b"tools", b"template")


def test_a_fork_keeps_everything_up_to_the_message_and_that_one_too() -> None:
    for last in range(5):
        made = fork(record(), "new", NOW, at_message=last)
        check_is_prefix(made, last)
        assert (made.tenant, made.id, made.namespace, made.title) == ("t", "new", b"n", "Title")
        assert made.created_at == made.used_at == NOW
        assert made.stem == record().stem or last == 0


def test_a_fork_without_a_message_keeps_all() -> None:
    source = record()
    made = fork(source, "new", NOW, at_message=None)
    check_is_prefix(made, 4)
    assert made.token_ids is source.token_ids


def test_a_fork_is_neither_saved_nor_pinned_and_does_not_end_with_its_source() -> None:
    made = fork(record(), "new", NOW, at_message=2)
    assert not made.saved and not made.pinned
    assert made.pinned_until is None and made.expires_at is None


def test_a_rollback_keeps_what_the_user_said_of_the_conversation() -> None:
    back = rollback(record(), to_message=2, drop_turns=None)
    check_is_prefix(back, 2)
    expected = replace(record(), token_ids=back.token_ids, chain=back.chain)
    for name in ("id", "title", "saved", "pinned", "pinned_until", "expires_at", "created_at"):
        assert getattr(back, name) == getattr(expected, name)


def test_dropped_turns_go_with_their_questions() -> None:
    check_is_prefix(rollback(record(), to_message=None, drop_turns=1), 2)
    check_is_prefix(rollback(record(), to_message=None, drop_turns=2), 0)
    # The last question has no reply yet.
    check_is_prefix(rollback(record(num_messages=4), to_message=None, drop_turns=1), 2)


def test_at_least_one_message_stays() -> None:
    with pytest.raises(InvalidRequest, match="at most 2") as raised:
        rollback(record(), to_message=None, drop_turns=3)
    assert raised.value.param == "drop_turns"
    without_system = replace(record(), roles=("user", "assistant", "user", "assistant", "user"))
    with pytest.raises(InvalidRequest, match="at most 2: the conversation has 3 turns"):
        rollback(without_system, to_message=None, drop_turns=3)
    only = replace(record(num_messages=1), roles=("user",))
    with pytest.raises(InvalidRequest, match="at most 0"):
        rollback(only, to_message=None, drop_turns=1)


@pytest.mark.parametrize("message", [5, 6, 10**9])
def test_a_message_that_there_is_not_is_refused_with_the_last_that_there_is(message: int) -> None:
    with pytest.raises(InvalidRequest, match="from 0 to 4") as raised:
        rollback(record(), to_message=message, drop_turns=None)
    assert raised.value.param == "to_message"
    with pytest.raises(InvalidRequest) as raised:
        fork(record(), "new", NOW, at_message=message)
    assert raised.value.param == "at_message"


def test_no_conversation_ends_where_the_template_hides_the_end() -> None:
    hidden = record(hidden=(0, 3))
    with pytest.raises(InvalidRequest, match="these messages: 1, 2, 4") as raised:
        fork(hidden, "new", NOW, at_message=0)
    assert (raised.value.param, raised.value.code) == ("at_message", "no_cut")
    with pytest.raises(InvalidRequest, match="message 0"):
        rollback(hidden, to_message=None, drop_turns=2)
    assert fork(hidden, "new", NOW, at_message=2).roles == record().roles[:3]


def test_the_last_message_needs_no_end_to_be_kept() -> None:
    hidden = record(hidden=(4,))
    assert rollback(hidden, to_message=4, drop_turns=None) is hidden
