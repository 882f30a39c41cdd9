"""What a fork and a rollback make of a conversation: records that end at an earlier message. Pure.

A conversation can end where a message ends, at a cut. Some templates hide the end of a message (a
system prompt that is printed inside the first question): nothing can end there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvserve.chat.conversations import Conversation
from kvserve.core.errors import InvalidRequest

if TYPE_CHECKING:
    from datetime import datetime


def fork(
    source: Conversation, conversation_id: str, now: datetime, *, at_message: int | None
) -> Conversation:
    """Return a conversation of its own that begins as `source` does.

    `at_message` is the index of the last message that it keeps, None for all. It shares every
    token's state with `source`, but not its pin, its life time or having been saved by order.
    Raises InvalidRequest.
    """
    ended = source if at_message is None else _ending_at(source, at_message, "at_message")
    return replace(
        ended,
        id=conversation_id,
        created_at=now,
        used_at=now,
        saved=False,
        pinned=False,
        pinned_until=None,
        expires_at=None,
    )


def rollback(
    record: Conversation, *, to_message: int | None, drop_turns: int | None
) -> Conversation:
    """Return the conversation as it was at an earlier message; one of the two says where.

    `to_message` is the index of the last message that stays. `drop_turns` takes away so many of
    the last turns, each a user's message with all that follows it. Raises InvalidRequest.
    """
    if to_message is not None:
        return _ending_at(record, to_message, "to_message")
    assert drop_turns is not None
    return _ending_at(record, _before_turns(record, drop_turns), "drop_turns")


def _before_turns(record: Conversation, drop_turns: int) -> int:
    """Return the index of the message before the last `drop_turns` turns."""
    questions = [index for index, role in enumerate(record.roles) if role == "user"]
    # A turn that nothing precedes cannot be dropped: a conversation is not empty.
    most = len(questions) - (questions[:1] == [0])
    if drop_turns > most:
        raise InvalidRequest(
            f"'drop_turns' must be at most {most}: the conversation has {len(questions)} turns, "
            "and at least one message has to stay.",
            param="drop_turns",
            code="invalid_value",
        )
    return questions[-drop_turns] - 1


def _ending_at(record: Conversation, message: int, field: str) -> Conversation:
    """Return the record without what comes after a message. Raises InvalidRequest."""
    last = len(record.roles) - 1
    if message == last:
        return record
    if message > last:
        raise InvalidRequest(
            f"'{field}' must be the index of a message that stays, from 0 to {last}.",
            param=field,
            code="invalid_value",
        )
    position = next((cut.position for cut in record.cuts if cut.message == message), None)
    if position is None:
        ends = ", ".join(str(cut.message) for cut in record.cuts) or "none"
        raise InvalidRequest(
            f"'{field}' leads to message {message}, whose end cannot be told in the prompt. A "
            f"conversation can end after these messages: {ends}.",
            param=field,
            code="no_cut",
        )
    return replace(
        record,
        # A copy: a view would keep the whole array alive, and be counted as if it did not.
        token_ids=record.token_ids[:position].copy(),
        chain=record.chain[: message + 2],
        roles=record.roles[: message + 1],
        cuts=tuple(cut for cut in record.cuts if cut.message <= message),
    )
