"""What a client sees of a reply, token by token."""

from __future__ import annotations

from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvserve.engine.text import StopStrings, TextStream

TEXTS = [
    "the cat sat on the mat",
    "naïve café",
    "日本語のテスト",
    "👩‍👩‍👧 family 👍🏽",
    "end of it all",
]


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE with few merges: most characters beyond ASCII are split over tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS[:1] * 3 + TEXTS[4:], trainer)
    return made


def encoded(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text).ids
    return ids


def special(name: str) -> int:
    found = tokenizer().token_to_id(name)
    assert found is not None
    return int(found)


def streamed(ids: list[int], *stops: str) -> tuple[list[str], TextStream]:
    """Feed tokens until a stop string is met; return all pieces, the last being what was left."""
    stream = TextStream(tokenizer(), stops)
    pieces = []
    for token in ids:
        pieces.append(stream.feed(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


@pytest.mark.parametrize("text", [*TEXTS, " leading and  double  spaces\n\n", "a"])
def test_pieces_are_whole_characters_and_join_to_the_text(text: str) -> None:
    ids = encoded(text)
    pieces, stream = streamed(ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert not stream.stopped


def test_characters_split_over_tokens_wait_for_their_last_byte() -> None:
    pieces, _ = streamed(encoded("é日👍"))
    assert [piece for piece in pieces if piece] == ["é", "日", "👍"]


def test_a_character_cut_off_by_the_limit_shows_as_a_replacement_after_the_text() -> None:
    ids = encoded("ok 👍")
    pieces, _ = streamed(ids[:-1])
    assert "".join(pieces[:-1]) == "ok "
    assert set(pieces[-1]) == {"\ufffd"}


def test_bytes_that_never_make_a_character_do_not_swallow_what_follows() -> None:
    broken = encoded("日")[:1] + encoded(" fine") + encoded("é")[:1] * 3 + encoded(" too")
    pieces, _ = streamed(broken)
    text = "".join(pieces)
    assert text.replace("\ufffd", "") == " fine too"
    assert text == tokenizer().decode(broken)


def test_special_tokens_are_not_shown() -> None:
    ids = [special("<|pad|>"), *encoded("the cat"), special("<|end|>"), *encoded(" sat")]
    pieces, _ = streamed([*ids, special("<|end|>")])
    assert "".join(pieces) == "the cat sat"


@pytest.mark.parametrize("text", TEXTS)
def test_a_stop_string_is_found_wherever_tokens_part(text: str) -> None:
    for start in range(1, len(text)):
        for end in range(start + 1, min(len(text), start + 5) + 1):
            stop = text[start:end]
            pieces, stream = streamed(encoded(text), stop)
            assert "".join(pieces) == text[: text.index(stop)]
            assert stream.stopped
            assert stream.finish() == ""


def test_the_first_of_several_stop_strings_ends_the_reply() -> None:
    pieces, stream = streamed(encoded("the cat sat on the mat"), "mat", "sat on", "nowhere")
    assert "".join(pieces) == "the cat "
    assert stream.stopped


def test_a_beginning_of_a_stop_string_is_held_back_and_given_at_the_end() -> None:
    stream = TextStream(tokenizer(), ("the mat!",))
    seen = "".join(stream.feed(token) for token in encoded("the cat sat on the mat"))
    assert seen == "the cat sat on "
    assert stream.finish() == "the mat"
    assert not stream.stopped
    assert stream.finish() == ""


def test_a_stop_string_in_what_was_left_is_met_at_the_end() -> None:
    stream = TextStream(tokenizer(), ("\ufffd",))
    seen = "".join(stream.feed(token) for token in encoded("ok 👍")[:-1])
    assert seen + stream.finish() == "ok "
    assert stream.stopped


def test_stop_strings_may_overlap_themselves() -> None:
    stops = StopStrings(["aab"])
    given = [stops.feed(letter) for letter in "aaab"]
    assert given == [("", False), ("", False), ("a", False), ("", True)]
    stops = StopStrings(["abab!"])
    assert "".join(stops.feed(letter)[0] for letter in "abababa") == "abab"
    assert stops.flush() == "aba"
