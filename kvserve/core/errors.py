"""The errors that kvserve raises on purpose.

    KvserveError
    ├── InvalidRequest            400  a field is wrong; `param` names it
    │   └── ContextTooLong        400  prompt and reply do not fit the model's context
    ├── NotFound                  404  no such model or conversation
    ├── Conflict                  409  what is stored, or how the server runs, forbids it
    ├── TooLarge                  413  over a limit that no waiting will lift
    ├── Damaged                   422  what was stored can no longer be used as a whole
    ├── QueueFull                 429  try again after `retry_after_s`
    ├── NotReady                  503  loading, stopping, or the engine has died
    ├── RequestFailed             500  the request broke inside; its batch-mates did not
    └── OutOfSpace                507  a guard of the disk refused a write; nothing was changed

Messages are shown to clients: they name the field and what is accepted, and never hold a path, a
stack trace or another user's text. The mapping to HTTP statuses lives in `kvserve.api.errors`.
"""

from __future__ import annotations


class KvserveError(Exception):
    """Base of all errors with an answer for the client.

    `param` is the request field at fault, `code` a stable machine-readable word.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequest(KvserveError):
    """A field of the request is wrong, unknown or unsupported."""


class ContextTooLong(InvalidRequest):
    """The prompt does not fit the context of the model."""

    def __init__(self, num_tokens: int, max_tokens: int, *, at_least: bool = False) -> None:
        more = "at least " if at_least else ""
        super().__init__(
            f"The prompt has {more}{num_tokens} tokens, but the model's context holds "
            f"{max_tokens} including at least one token of reply.",
            param="messages",
            code="context_length_exceeded",
        )


class NotFound(KvserveError):
    """The named model or conversation does not exist for this caller."""


class Conflict(KvserveError):
    """The request contradicts what is stored, or how the server was started."""


class TooLarge(KvserveError):
    """The request is over a fixed limit."""


class Damaged(KvserveError):
    """What was stored is damaged; the message says how much of it can still be used."""


class QueueFull(KvserveError):
    """The waiting line is full; the client may come back after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, code="queue_full")
        self.retry_after_s = retry_after_s


class NotReady(KvserveError):
    """The server cannot answer now: it is loading, stopping, or its engine has died."""


class RequestFailed(KvserveError):
    """The computation of this one request failed."""


class OutOfSpace(KvserveError):
    """A write was refused by a guard, or the disk is full; nothing was changed."""
