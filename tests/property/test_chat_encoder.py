"""Tokenising from a remembered prefix gives what tokenising the whole gives, for any text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvserve.chat.boundaries import prefix_hashes, shared_length
from kvserve.chat.encoder import Encoder
from kvserve.chat.template import Formatter
from tests.unit.chat_fixtures import THINKING, byte_tokenizer, chat

PIECES = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "\n", " ", "<", "|>", "<s>", "é", "e\u0301", "👩\u200d👧", "ab"]
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
def test_resuming_is_exact(history: list[tuple[str, str]]) -> None:
    encoder = Encoder(byte_tokenizer())
    cold = byte_tokenizer().backend_tokenizer
    text = ""
    for words, border in history:
        text += words
        marks = sorted({len(text), len(text) - len(words)})
        text += border
        ids, positions = encoder.encode(text, marks, prefix_hashes(text, marks))
        assert ids.tolist() == cold.encode(text, add_special_tokens=False).ids
        ends = [end for _, end in cold.encode(text, add_special_tokens=False).offsets]
        assert positions == [sum(end <= mark for end in ends) for mark in marks]


@given(TEXTS, TEXTS)
def test_shared_length_is_the_longest(a: str, b: str) -> None:
    length = shared_length(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]


@given(st.lists(TEXTS, min_size=1, max_size=7), st.sampled_from([None, THINKING]))
def test_a_formatter_that_remembers_renders_as_a_new_one(
    words: list[str], template: str | None
) -> None:
    formatter = Formatter(byte_tokenizer(), chat_template=template)
    for count in range(1, len(words) + 1, 2):
        warm = formatter.render(chat(*words[:count]))
        cold = Formatter(byte_tokenizer(), chat_template=template).render(chat(*words[:count]))
        assert warm.token_ids.tolist() == cold.token_ids.tolist()
        assert warm.cuts[-1] == cold.cuts[-1]
