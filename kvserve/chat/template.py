"""The chat template: messages to a prompt with its cuts.

State: the tokenizer, which is shared and only read, and the memories of `BoundaryFinder` and
`Encoder`. Thread-safe, and slow for long texts: call it in a worker thread, never on the event
loop.
Does not keep a template's date (`strftime_now`) still, and does not tell special tokens written by
the template from look-alikes in a user's text.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kvserve.chat.boundaries import BoundaryFinder, prefix_hashes
from kvserve.chat.encoder import Encoder
from kvserve.chat.messages import check_text, exact_chain, plain_messages
from kvserve.core.errors import ContextTooLong, InvalidRequest
from kvserve.core.types import Cut, Prompt

NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})

_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {
    "messages"
}
"""Names that would take over the rendering itself, a template of the caller's own among them."""


class Formatter:
    """One per model. `chat_template` stands in for the tokenizer's own.

    Raises `ValueError` for a tokenizer without fast backend. One without any chat template is
    accepted, for the sake of raw completions; `render` then raises.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._encoder = Encoder(tokenizer)
        self._boundaries = BoundaryFinder()

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_template or self._tokenizer.chat_template)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] = NO_ARGUMENTS,
        context_length: int | None = None,
    ) -> Prompt:
        """Return the prompt that asks for the next reply.

        A last message of the assistant is left open, for the reply to go on from its words. There
        is a cut before whatever the template appends to open the reply. With `context_length` a
        text that cannot fit is refused before it is tokenised.

        Raises `InvalidRequest`, with the template's own words where it refuses, and
        `ContextTooLong`.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "This model has no chat template, so it cannot answer chat messages.",
                param="messages",
            )
        plain = plain_messages(messages)
        _check_arguments(template_kwargs)
        check_text(tools or (), "tools")
        tool_list = [dict(tool) for tool in tools] if tools else None
        open_ended = plain[-1].get("role") == "assistant"

        def history(some: Sequence[Mapping[str, Any]]) -> str:
            return self._apply(some, tool_list, template_kwargs)

        if open_ended:
            whole = self._continued(plain, tool_list, template_kwargs)
        else:
            whole = self._apply(plain, tool_list, template_kwargs, add_generation_prompt=True)
        if context_length is not None and self._encoder.min_tokens(whole) >= context_length:
            raise ContextTooLong(self._encoder.min_tokens(whole), context_length, at_least=True)

        chain = exact_chain(plain, tools=tool_list, template_kwargs=template_kwargs)
        ends = self._boundaries.find(whole, plain, chain, history, closed=not open_ended)
        marks = list(ends.values())
        token_ids, positions = self._encoder.encode(whole, marks, prefix_hashes(whole, marks))
        if len(token_ids) == 0:
            raise InvalidRequest("The messages render to an empty prompt.", param="messages")
        return Prompt(token_ids, _cuts(ends, positions))

    def _apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else list(tools),  # type: ignore[arg-type]
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **template_kwargs,
            )
        except TemplateError as error:
            words = error.message or type(error).__name__
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {words}",
                param="messages",
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # What template expressions raise on values that they did not expect. The text of a
            # KeyError or the like says nothing without the template, and may hold the whole chat.
            raise InvalidRequest(
                "The model's chat template cannot render these messages: "
                f"a field is missing or of an unexpected type ({type(error).__name__}).",
                param="messages",
            ) from error
        except RecursionError as error:
            raise InvalidRequest("messages are nested too deeply.", param="messages") from error
        assert isinstance(text, str)
        return text

    def _continued(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        where = f"messages[{len(messages) - 1}]"
        if messages[-1].get("tool_calls") or not isinstance(messages[-1].get("content"), str):
            raise InvalidRequest(
                f"{where} is the assistant's and holds no text to go on from; end with a message "
                "of the user, a tool result, or an assistant message with content alone.",
                param=where,
            )
        return self._apply(messages, tools, template_kwargs, continue_final_message=True)


def _check_arguments(template_kwargs: Mapping[str, Any]) -> None:
    for name in template_kwargs:
        if name in _RESERVED:
            raise InvalidRequest(
                f"chat_template_kwargs.{name} cannot be set: it belongs to the rendering itself.",
                param=f"chat_template_kwargs.{name}",
            )
    check_text(template_kwargs, "chat_template_kwargs")


def _cuts(ends: Mapping[int, int], positions: Sequence[int]) -> tuple[Cut, ...]:
    cuts: list[Cut] = []
    for message, position in zip(ends, positions, strict=True):
        if position > (cuts[-1].position if cuts else 0):
            cuts.append(Cut(position, message))
    return tuple(cuts)
