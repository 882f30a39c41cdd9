"""What users are told when an order for a conversation cannot be done. Pure.

In one place, so that a thing is called the same whichever call met it; `code` is for programs.
"""

from __future__ import annotations

from kvserve.core.errors import Conflict, Damaged, NotFound


def unknown_conversation() -> NotFound:
    """Return the error for an id that the caller does not have, whoever else may."""
    return NotFound(
        "There is no conversation of this id.",
        param="conversation_id",
        code="conversation_not_found",
    )


def id_taken(conversation_id: str, param: str) -> Conflict:
    """Return the error for a new conversation of an id that the caller has already."""
    return Conflict(
        f"There is a conversation '{conversation_id}' already; choose another id or delete it.",
        param=param,
        code="id_taken",
    )


def persistence_off() -> Conflict:
    """Return the error for orders that need a disk."""
    return Conflict(
        "This server keeps conversations in memory only (--persist off).", code="persistence_off"
    )


def state_not_held() -> Conflict:
    """Return the error for state that is to be written and is nowhere any more."""
    return Conflict(
        "The conversation's state is no longer in memory, and not on disk either. "
        "Its next turn will bring it back.",
        param="conversation",
        code="state_not_held",
    )


def model_changed(differs: tuple[str, ...]) -> Conflict:
    """Return the error for the state of another model; `differs` are fields of its identity."""
    return Conflict(
        "The conversation's state was made by another model than the one that is served. "
        f"What differs: {', '.join(differs)}.",
        code="model_changed",
    )


def damaged(usable: int, num_tokens: int) -> Damaged:
    """Return the error for a conversation whose first `usable` tokens only have sound state."""
    return Damaged(
        f"A file of this conversation is damaged or missing, and is not used any more. {usable} of "
        f"its {num_tokens} tokens can still be used; its next turn computes the others again.",
        param="conversation",
        code="snapshot_damaged",
    )


def unreadable_upload(reason: str) -> Damaged:
    """Return the error for an upload that is not an exported conversation, whole and sound."""
    return Damaged(
        f"The file is not an exported conversation, or it is damaged ({reason}). "
        "0 of its tokens can be used; nothing was imported.",
        code="snapshot_damaged",
    )
