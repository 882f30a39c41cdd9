"""Refusals in words: what a wire field accepts, and pydantic's findings as an `InvalidRequest`.

Stateless and pure. The text of what a field accepts stands where the field is defined (`accepts`),
so the message that a client gets cannot drift from the check that refused it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, WrapValidator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from kvserve.core.errors import InvalidRequest

_SHOWN_CHARACTERS = 64
_TEXTS = {
    "refused": "{text}",
    "missing": "is required",
    "list_type": "must be a list",
    "too_short": "must have at least {min_length} item(s)",
    "too_long": "must have at most {max_length} items",
    "model_type": "must be an object",
}


class Wire(BaseModel):
    """Base of all request shapes: no coercion, and an unknown field is refused by its name."""

    model_config = ConfigDict(strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown_fields(cls, value: Any) -> Any:
        # Not pydantic's extra="forbid": it reports all of them, and a body may hold a million.
        if isinstance(value, dict):
            unknown = next((name for name in value if name not in cls.model_fields), None)
            if unknown is not None:
                known = ", ".join(cls.model_fields)
                raise refusal(
                    f"is not a field that is known here; accepted are {known}",
                    at=f".{shortened(unknown)}",
                )
        return value


def refusal(text: str, *, at: str = "") -> PydanticCustomError:
    """Return the error for a value that is not accepted.

    `text` continues a sentence that begins with the field's name; `at` leads from the field to the
    part of it that is at fault, such as `[2].text`.
    """
    return PydanticCustomError("refused", "{text}", {"text": text, "at": at})


def accepts(what: str) -> WrapValidator:
    """Return a validator that says "must be `what`" in place of pydantic's own words."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise refusal(f"must be {what}, not {described(value)}") from None

    return WrapValidator(check)


def described(value: Any) -> str:
    """Name a JSON value in a few words, quoting it where it is short."""
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case str() if len(value) > _SHOWN_CHARACTERS:
            return "a longer string"
        case _:
            return json.dumps(value, ensure_ascii=False)


def shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def invalid_request(error: ValidationError) -> InvalidRequest:
    """Return the first finding of `error` with the field's path, such as `messages[2].content`."""
    first: ErrorDetails = error.errors(include_url=False, include_input=False)[0]
    context = first.get("ctx", {})
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]]
    param = ("".join(steps) + context.get("at", "")).removeprefix(".")
    text = _TEXTS.get(first["type"], "is not valid").format_map(context)
    subject = f"'{param}'" if param else "The body"
    return InvalidRequest(f"{subject} {text}.", param=param or None, code="invalid_value")


def check_query(given: Iterable[str], *known: str) -> None:
    """Raise `InvalidRequest` for a query parameter that is not one of `known`."""
    for name in given:
        if name not in known:
            raise InvalidRequest(
                f"'{shortened(name)}' is not a parameter that is known here; accepted are "
                f"{', '.join(known)}.",
                param=shortened(name),
                code="invalid_value",
            )


def check_depth(value: Any, *, limit: int = 64) -> Any:
    """Return `value`, or raise where it nests deeper than `limit`.

    What is free-form here is walked recursively by templates, where Python's own limit would turn
    a request into a server error.
    """
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
    raise refusal(f"must not nest deeper than {limit} levels")
