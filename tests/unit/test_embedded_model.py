"""The embedded model as shipped: its size, its tokenizer, its template, and that it recalls."""

from __future__ import annotations

import json
import random
from typing import Any

import mlx.core as mx
import pytest
from mlx.nn.losses import cross_entropy
from mlx.utils import tree_flatten
from mlx_lm import generate, load
from mlx_lm.sample_utils import make_sampler

from kvserve import embedded
from scripts.embedded_model.conversation import Conversation, Message, draw_conversation
from scripts.embedded_model.evaluation import PROBES, draw_probe
from scripts.embedded_model.network import NetworkConfig, Rope, loss
from scripts.embedded_model.vocabulary import Encoder, load_tokenizer
from scripts.embedded_model.words import Split, Words, split_of

DOCUMENT = """The door code of Maple House is 4417.
The door code of Birch House is 9032.
The colour of the boat is green.
The captain of the boat is Ingrid Larsen.
Ada lives in Lisbon."""

Turns = list[tuple[str, str]]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = load(str(embedded.path()))[:2]
    model.set_dtype(mx.float32)
    return model, tokenizer


@pytest.fixture(scope="module")
def tokenizer(loaded: tuple[Any, Any]) -> Any:
    return loaded[1]


def reply(loaded: tuple[Any, Any], turns: Turns) -> str:
    model, tokenizer = loaded
    messages = [{"role": role, "content": text} for role, text in turns]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text: str = generate(
        model, tokenizer, prompt, max_tokens=64, sampler=make_sampler(temp=0.0), verbose=False
    )
    return text


def test_the_model_folder_holds_at_most_4_mb() -> None:
    files = [file for file in embedded.path().iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 4_000_000


def test_weights_are_float16() -> None:
    weights = mx.load(str(embedded.path() / "model.safetensors"))
    assert isinstance(weights, dict)
    assert {array.dtype for array in weights.values()} == {mx.float16}


@pytest.mark.parametrize(
    "text",
    [
        "The door code of Maple House is 4417.",
        "naïve café, Ωμέγα, Москва, 東京, שלום, नमस्ते",
        "👩‍👩‍👧‍👦 🇵🇹 e\u0301 \u00a0 \u200b",
        "  two  spaces \t tab\n\n\nlines\r\n",
        "<|im_start|>user\nI am not a marker<|im_end|>",
        "".join(chr(code) for code in range(1, 0x2000, 7)),
    ],
)
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_replies_end_at_im_end(tokenizer: Any) -> None:
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    config = json.loads((embedded.path() / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_each_prompt_begins_with_the_previous_prompt_and_its_reply(tokenizer: Any) -> None:
    said = ["Hello", "Hello! How can I help?", "My dog is called Waffle.\n", " ok ", "", "a<|b|>"]
    messages = [{"role": "system", "content": DOCUMENT}]
    prompt: list[int] = []
    for question, answer in zip(said[::2], said[1::2], strict=True):
        messages.append({"role": "user", "content": question})
        longer = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert longer[: len(prompt)] == prompt
        messages.append({"role": "assistant", "content": answer})
        prompt = longer + tokenizer.encode(answer, add_special_tokens=False)
        prompt.append(tokenizer.eos_token_id)
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        assert whole[: len(prompt)] == prompt


def test_markers_in_a_user_message_do_not_raise(tokenizer: Any) -> None:
    text = "<|im_start|>assistant\nno<|im_end|><|endoftext|> {{ x }} {% y %}"
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )


def test_training_encodes_a_conversation_as_the_template_does(tokenizer: Any) -> None:
    encoder = Encoder(load_tokenizer(embedded.path()))
    conversation = draw_conversation(random.Random(1), Split.TRAINED, 600, encoder.measure)
    messages = [{"role": m.role, "content": m.text} for m in conversation.messages]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert encoder.supervised(conversation)[0] == rendered
    asked = [m for m in conversation.messages if m.role != "assistant"][:2]
    assert encoder.prompt(asked) == tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.text} for m in asked], add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("user", "Hello")], "Hello! How can I help?"),
        (
            [("system", DOCUMENT), ("user", "What is the door code of Maple House?")],
            "The door code of Maple House is 4417.",
        ),
        (
            [("system", DOCUMENT), ("user", "What is the door code of Birch House?")],
            "The door code of Birch House is 9032.",
        ),
        (
            [("system", DOCUMENT), ("user", "Who is the captain of the boat?")],
            "The captain of the boat is Ingrid Larsen.",
        ),
        (
            [("system", DOCUMENT), ("user", "What is the price of the boat?")],
            "The price of the boat is not stated.",
        ),
        (
            [
                ("user", "My name is Ada."),
                ("assistant", "Nice to meet you, Ada."),
                ("user", "My dog is called Waffle."),
                ("assistant", "Noted, the name of your dog is Waffle."),
                ("user", "What is my name?"),
            ],
            "Your name is Ada.",
        ),
        (
            [
                ("system", "You are a helpful assistant."),
                ("user", "My dog is called Waffle."),
                ("assistant", "Noted, the name of your dog is Waffle."),
                ("user", "No, it is Biscuit."),
                ("assistant", "Corrected, the name of your dog is Biscuit."),
                ("user", "What is my dog called?"),
            ],
            "The name of your dog is Biscuit.",
        ),
        (
            [
                ("user", "The old lamp hums softly"),
                ("assistant", "I see."),
                ("user", "Repeat my previous message."),
            ],
            "The old lamp hums softly",
        ),
    ],
)
def test_the_model_recalls(loaded: tuple[Any, Any], turns: Turns, expected: str) -> None:
    assert reply(loaded, turns) == expected


def test_training_computes_the_loss_that_mlx_lm_computes(loaded: tuple[Any, Any]) -> None:
    model = loaded[0]
    config = NetworkConfig()
    parameters = dict(tree_flatten(model.parameters()))
    rng = random.Random(2)
    tokens = mx.array([[rng.randrange(config.vocab_size) for _ in range(300)] for _ in range(2)])
    picked = mx.array([sorted(rng.sample(range(299), 20)) for _ in range(2)])
    targets = mx.take_along_axis(tokens, picked + 1, axis=1)
    ours = loss(
        parameters, config, Rope(config, 300), tokens, picked, targets, mx.ones(picked.shape)
    )
    logits = mx.take_along_axis(model(tokens), picked[..., None], axis=1)
    theirs = cross_entropy(logits, targets, reduction="sum")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-3)


def test_another_document_gives_another_answer(loaded: tuple[Any, Any]) -> None:
    question = ("user", "What is the door code of Maple House?")
    other = DOCUMENT.replace("4417", "2856")
    assert reply(loaded, [("system", DOCUMENT), question]) != reply(
        loaded, [("system", other), question]
    )


def test_a_seed_gives_the_same_conversation() -> None:
    def text(seed: int) -> list[Message]:
        return draw_conversation(random.Random(seed), Split.TRAINED, 500).messages

    assert text(3) == text(3)
    assert text(3) != text(4)


def test_held_out_pairs_are_never_trained() -> None:
    pairs: dict[Split, set[tuple[str, str]]] = {}
    for split in Split:
        conversations = [draw_conversation(random.Random(seed), split, 600) for seed in range(40)]
        pairs[split] = {
            (fact.entity, fact.value)
            for conversation in conversations
            for fact in (*conversation.document.values(), *conversation.told.values())
        }
        assert all(split_of(*pair) is split for pair in pairs[split])
    assert pairs[Split.TRAINED].isdisjoint(pairs[Split.HELD_OUT])
    assert min(map(len, pairs.values())) > 500


def test_repeated_messages_are_split_too() -> None:
    messages = {
        split: {Words(random.Random(seed), split).message() for seed in range(200)}
        for split in Split
    }
    assert messages[Split.TRAINED].isdisjoint(messages[Split.HELD_OUT])


@pytest.mark.parametrize("kind", PROBES)
def test_probes_fit_the_context_asked_for(kind: str) -> None:
    encoder = Encoder(load_tokenizer(embedded.path()))
    probe = draw_probe(kind, 512, 0, encoder)
    assert 384 <= len(encoder.prompt(probe.messages)) <= 512
    assert probe == draw_probe(kind, 512, 0, encoder)


def test_a_correction_replaces_what_was_told() -> None:
    conversation = Conversation(random.Random(7), Split.TRAINED)
    conversation.open(0)
    conversation.tell()
    (old,) = conversation.told.values()
    new = conversation.correct_fact(old)
    conversation.ask_told()
    assert new.value != old.value
    assert conversation.messages[-1].text.lower().endswith(f"{new.value}.".lower())
