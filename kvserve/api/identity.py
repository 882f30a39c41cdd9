"""Who asks, and for which conversation: ids taken from the body, from headers, or made.

Stateless and pure but for the random request id. An API key never leaves this module: everything
below sees a digest of it.
"""

from __future__ import annotations

import hashlib
import re
import secrets

from starlette.datastructures import Headers

from kvserve.core.errors import InvalidRequest

CONVERSATION_HEADERS = (
    "X-Conversation-Id",
    "X-Session-Id",
    "X-Session-Affinity",
    "X-OpenWebUI-Chat-Id",
)
_CONVERSATION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def conversation_id_of(
    headers: Headers, *, conversation: str | None, conversation_id: str | None
) -> str | None:
    """Return the id that the request names, or None where it names none.

    The first of the body's `conversation`, its `conversation_id` and the headers decides; the
    others are not looked at. Raises `InvalidRequest` naming the source of a bad id.
    """
    for field, value in (("conversation", conversation), ("conversation_id", conversation_id)):
        if value is not None:
            return checked_id(value, source=field)
    for name in CONVERSATION_HEADERS:
        values = set(headers.getlist(name))
        if len(values) > 1:
            raise InvalidRequest(
                f"'{name}' was sent {len(values)} times with different values; send one.",
                param=name,
                code="invalid_conversation_id",
            )
        if values:
            return checked_id(values.pop(), source=name)
    return None


def checked_id(value: str, *, source: str) -> str:
    """Return `value` if it may name a conversation; `source` is where the client wrote it."""
    if not _CONVERSATION_ID.fullmatch(value):
        raise InvalidRequest(
            f"'{source}' must be an id of 1 to 128 of the characters A-Z a-z 0-9 . _ : -",
            param=source,
            code="invalid_conversation_id",
        )
    return value


def tenant_of(headers: Headers) -> str:
    """Return the caller's tenant: "" without a key, else 32 hex digits that stand for the key.

    A key means the same tenant in `Authorization` (first choice) and in `x-api-key`.
    """
    authorization = headers.get("authorization", "").strip()
    scheme, _, credentials = authorization.partition(" ")
    key = credentials.strip() if scheme.lower() == "bearer" else authorization
    key = key or headers.get("x-api-key", "").strip()
    if not key:
        return ""
    return hashlib.sha256(b"kvserve tenant\0" + key.encode("latin-1")).hexdigest()[:32]


def request_id_of(headers: Headers) -> str:
    """Return the client's own request id where it is fit for a header and a log, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
