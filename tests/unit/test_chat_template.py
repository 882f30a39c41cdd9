"""The chat template: cuts by rendering, at a bounded cost, and errors in the template's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvserve.chat import encoder as encoder_module
from kvserve.chat.boundaries import MAX_UNSEEN, BoundaryFinder, shared_length
from kvserve.chat.encoder import Encoder
from kvserve.chat.messages import plain_messages
from kvserve.chat.template import Formatter
from kvserve.core.errors import ContextTooLong, InvalidRequest
from kvserve.core.types import Prompt
from tests.unit.chat_fixtures import (
    MOVING,
    THINKING,
    byte_tokenizer,
    chat,
    message,
    real_tokenizer,
    sessions,
)


def text_of(prompt: Prompt, upto: int | None = None) -> str:
    return str(byte_tokenizer().decode(prompt.token_ids[:upto].tolist()))


@contextmanager
def counted(formatter: Formatter, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the renderings of `formatter`."""
    calls = [0]
    apply = formatter._apply

    def counting(*args: Any, **kwargs: Any) -> str:
        calls[0] += 1
        return apply(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(formatter, "_apply", counting)
        yield calls


def num_shared(a: Prompt, b: Prompt) -> int:
    length = min(len(a), len(b))
    differs = np.nonzero(a.token_ids[:length] != b.token_ids[:length])[0]
    return int(differs[0]) if len(differs) else length


def test_each_cut_is_the_end_of_its_message() -> None:
    prompt = Formatter(byte_tokenizer()).render(chat("Hi", "Hello", "Bye"))
    ends = [text_of(prompt, cut.position) for cut in prompt.cuts]
    assert [cut.message for cut in prompt.cuts] == [0, 1, 2, 3]
    assert [end.rsplit("<|im_start|>", 1)[1] for end in ends] == [
        "system\nBe brief.<|im_end|>\n",
        "user\nHi<|im_end|>\n",
        "assistant\nHello<|im_end|>\n",
        "user\nBye<|im_end|>\n",
    ]


def test_the_last_cut_stands_before_a_suffix_that_history_never_repeats() -> None:
    formatter = Formatter(byte_tokenizer(), chat_template=THINKING)
    first = formatter.render(chat("Hi"))
    assert text_of(first).endswith("<|im_start|>assistant\n<think>\n")
    assert text_of(first, first.cuts[-1].position).endswith("Hi<|im_end|>\n")
    later = formatter.render(chat("Hi", "Hello", "Bye"))
    assert num_shared(first, later) >= first.cuts[-1].position
    assert first.cuts[-1] in later.cuts


def test_a_reply_that_looks_otherwise_at_the_end_is_still_cut_in_the_middle() -> None:
    formatter = Formatter(byte_tokenizer(), chat_template=THINKING)
    prompt = formatter.render(chat("Hi", "Hello", "Bye"))
    by_message = {cut.message: text_of(prompt, cut.position) for cut in prompt.cuts}
    assert by_message[2].endswith("Hello<|im_end|>\n<|im_start|>user\n")
    assert by_message[0].endswith("Be brief.<|im_end|>\n<|im_start|>user\n")


def test_a_system_prompt_that_moves_leaves_no_cut_at_the_first_token() -> None:
    formatter = Formatter(byte_tokenizer(), chat_template=MOVING)
    prompt = formatter.render(chat("Hi", "Hello", "Bye"))
    assert prompt.cuts[0].position > 1
    assert prompt.cuts[-1].position == len(prompt)


def test_a_growing_conversation_renders_few_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    for template, most in ((None, 3), (THINKING, 4)):
        formatter = Formatter(byte_tokenizer(), chat_template=template)
        words = ["Hi"]
        formatter.render(chat(*words))
        for turn in range(30):
            words += [f"answer {turn}", f"question {turn}"]
            with counted(formatter, monkeypatch) as calls:
                prompt = formatter.render(chat(*words))
            assert calls[0] <= most
            assert len(prompt.cuts) == len(words) + 1


def test_a_long_unseen_history_renders_only_its_first_and_last_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    formatter = Formatter(byte_tokenizer())
    with counted(formatter, monkeypatch) as calls:
        prompt = formatter.render(chat(*(f"words {i}" for i in range(301))))
    assert calls[0] == 1 + 1 + MAX_UNSEEN
    assert [cut.message for cut in prompt.cuts] == [0, *range(302 - MAX_UNSEEN, 302)]


def test_a_remembered_place_is_not_believed_when_the_text_before_it_changed() -> None:
    # A template that shows how many messages follow: every place moves when the chat grows.
    template = "{% for m in messages %}{{ '<s>' * loop.revindex + m.content }}{% endfor %}"
    formatter = Formatter(byte_tokenizer(), chat_template=template)
    for words in (["a"], ["a", "b", "c"], ["a"]):
        fresh = Formatter(byte_tokenizer(), chat_template=template).render(chat(*words))
        assert formatter.render(chat(*words)).cuts[-1] == fresh.cuts[-1]


def test_tools_and_arguments_of_the_template_are_part_of_what_is_remembered() -> None:
    template = "{{ tools }}{{ mood }}" + str(byte_tokenizer().chat_template)
    formatter = Formatter(byte_tokenizer(), chat_template=template)
    plain = formatter.render(chat("Hi"))
    moody = formatter.render(chat("Hi"), template_kwargs={"mood": "good"})
    tooled = formatter.render(chat("Hi"), tools=[{"type": "function"}])
    assert len({plain.cuts, moody.cuts, tooled.cuts}) == 3


def test_content_parts_are_joined_and_other_parts_are_named() -> None:
    formatter = Formatter(byte_tokenizer())
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    joined = formatter.render([message("user", parts)])
    assert text_of(joined) == text_of(formatter.render([message("user", "Hello")]))
    with pytest.raises(InvalidRequest, match=r"messages\[1\].content\[1\].type") as caught:
        formatter.render([message("system", "s"), message("user", [parts[0], {"type": "image"}])])
    assert caught.value.param == "messages[1].content[1].type"


def test_the_template_refuses_in_its_own_words() -> None:
    formatter = Formatter(byte_tokenizer(), chat_template=THINKING)
    with pytest.raises(InvalidRequest, match="No user query found") as caught:
        formatter.render([message("system", "s")])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content + 1 }}", "{{ 1 // 0 }}", "{{ messages[0] + 1 }}"]
)
def test_a_template_that_breaks_is_a_bad_request(template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Formatter(byte_tokenizer(), chat_template=template).render(chat("secret"))
    assert "secret" not in caught.value.message


def test_a_model_without_template_says_so() -> None:
    bare = Formatter(byte_tokenizer())
    bare._tokenizer = type("Bare", (), {"chat_template": None})()
    assert not bare.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        bare.render(chat("Hi"))


def test_a_tokenizer_without_fast_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="fast"):
        Encoder(object())  # type: ignore[arg-type]


def test_callers_cannot_bring_their_own_template() -> None:
    for name in ("chat_template", "messages", "tokenize", "add_generation_prompt"):
        with pytest.raises(InvalidRequest) as caught:
            Formatter(byte_tokenizer()).render(chat("Hi"), template_kwargs={name: "x"})
        assert caught.value.param == f"chat_template_kwargs.{name}"


def test_half_a_surrogate_pair_is_a_bad_request_wherever_it_stands() -> None:
    formatter = Formatter(byte_tokenizer())
    half = "a\ud800"
    call = {"function": {"name": half, "arguments": "{}"}}
    for messages in (
        chat(half),
        [message("user", [{"type": "text", "text": half}])],
        [message("user", "u"), message("assistant", None, tool_calls=[call]), message("user", "v")],
    ):
        with pytest.raises(InvalidRequest, match="surrogate"):
            formatter.render(messages)
    with pytest.raises(InvalidRequest, match="surrogate"):
        formatter.render(chat("Hi"), tools=[{"name": half}])
    with pytest.raises(InvalidRequest, match="surrogate"):
        formatter.render(chat("Hi"), template_kwargs={"mood": half})


def test_values_nested_without_end_are_a_bad_request() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        Formatter(byte_tokenizer()).render(chat("Hi"), tools=[{"a": deep}])


def test_ten_megabytes_are_refused_before_they_are_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    formatter = Formatter(byte_tokenizer())

    def never(*_: Any) -> Any:
        raise AssertionError("tokenised")

    monkeypatch.setattr(Encoder, "_encode", never)
    with pytest.raises(ContextTooLong, match="at least"):
        formatter.render(chat("x" * 10_000_000), context_length=100_000)
    with pytest.raises(AssertionError, match="tokenised"):
        formatter.render(chat("short"), context_length=100_000)


def test_min_tokens_is_a_lower_bound() -> None:
    encoder = Encoder(byte_tokenizer())
    for text in ("", "abc", "<|im_start|>" * 50, "e\u0301\u1112\u1161\u11ab" * 40, "日本語 " * 30):
        ids, _ = encoder.encode(text, [], {})
        assert encoder.min_tokens(text) <= len(ids)
    assert encoder.min_tokens("x" * 1200) == 100  # "<|im_start|>" stands for twelve bytes


def test_an_assistant_message_at_the_end_is_left_open() -> None:
    formatter = Formatter(byte_tokenizer())
    prompt = formatter.render(chat("Name one.", "I choose"))
    assert text_of(prompt).endswith("assistant\nI choose")
    assert text_of(prompt, prompt.cuts[-1].position).endswith("Name one.<|im_end|>\n")
    call = message("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])
    with pytest.raises(InvalidRequest, match="no text to go on from"):
        formatter.render([message("user", "u"), call])


def test_tool_arguments_reach_the_template_as_an_object() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    bad = {"function": {"name": "f", "arguments": "not json"}}
    plain = plain_messages([message("assistant", None, tool_calls=[call, bad])])
    assert plain[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert plain[0]["tool_calls"][1] == bad
    assert plain[0]["content"] == ""
    assert plain_messages(plain) == plain


def test_the_memory_of_token_prefixes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "MAX_REMEMBERED_TOKENS", 500)
    formatter = Formatter(byte_tokenizer())
    for i in range(30):
        formatter.render(chat("x" * (10 + i)))
    held = formatter._encoder
    assert held._num_remembered == sum(len(e.ids) for e in held._memory.values()) <= 500


def test_only_new_text_is_tokenised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    formatter = Formatter(byte_tokenizer())
    formatter.render(chat("x" * 5000))
    lengths: list[int] = []
    encode = Encoder._encode

    def watching(self: Encoder, text: str) -> Any:
        lengths.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Encoder, "_encode", watching)
    formatter.render(chat("x" * 5000, "fine", "more"))
    assert len(lengths) == 1 and lengths[0] < 200


def test_shared_length_finds_the_first_difference() -> None:
    for a, b, expected in (("", "", 0), ("ab", "abc", 2), ("abx", "aby", 2), ("x", "y", 0)):
        assert shared_length(a, b) == expected


@cache
def real_formatter(tokenizer: str) -> Formatter:
    return Formatter(real_tokenizer(tokenizer))


REAL = [
    ("qwen3", None),
    ("mistral-v0.3", None),
    ("qwen3", "Qwen-Qwen3-0.6B"),
    ("qwen3", "Qwen3.5-4B"),
    ("qwen3", "google-gemma-4-31B-it"),
    ("qwen3", "mistralai-Mistral-Nemo-Instruct-2407"),
    ("qwen3", "openai-gpt-oss-120b"),
]


@pytest.mark.parametrize(("tokenizer", "template"), REAL)
def test_on_real_sessions_cuts_are_shared_and_tokens_exact(
    shared_data: Path, tokenizer: str, template: str | None
) -> None:
    real = real_tokenizer(tokenizer)
    source = None
    if template is not None:
        source = (shared_data / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    formatter = copy(real_formatter(tokenizer))  # building one takes a second
    formatter._chat_template, formatter._boundaries = source, BoundaryFinder()
    backend = real.backend_tokenizer
    shared = covered = turns = 0
    for name, count in (("oasst_branches", 8), ("reason_tools", 3)):
        for session in sessions(name, count):
            before: Prompt | None = None
            for index, spoken in enumerate(session["messages"]):
                if spoken["role"] != "assistant":
                    continue
                history = session["messages"][:index]
                try:
                    prompt = formatter.render(history, tools=session.get("tools"))
                except InvalidRequest:
                    continue  # the template refuses tool call ids, orders of roles
                turns += 1
                plain = plain_messages(history)
                tools = session.get("tools") or None
                whole = formatter._apply(plain, tools, {}, add_generation_prompt=True)
                cold = backend.encode(whole, add_special_tokens=False).ids
                assert prompt.token_ids.tolist() == cold
                positions = [cut.position for cut in prompt.cuts]
                assert positions == sorted(set(positions))
                assert positions[0] > 0 and positions[-1] <= len(prompt)
                assert prompt.cuts[-1].message == index - 1
                suffix = len(whole) - shared_length(formatter._apply(plain, tools, {}), whole)
                tail = prompt.token_ids[positions[-1] :].tolist()
                assert suffix == 0 or 0 < len(tail) <= suffix
                if before is not None:
                    common = num_shared(before, prompt)
                    both = {c.position for c in before.cuts} & set(positions)
                    shared += common
                    covered += max((p for p in both if p <= common), default=0)
                before = prompt
    assert turns > 10
    # What two prompts of a conversation share ends, but for a few tokens, at a cut of both; with
    # Mistral the tools move, so that the old prompt has no cut just where the new one leaves it.
    least = 0.7 if tokenizer.startswith("mistral") or "Nemo" in (template or "") else 0.95
    assert covered >= least * shared
