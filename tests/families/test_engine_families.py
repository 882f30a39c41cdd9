"""Concurrent conversations through the real engine loop, for every combination of cache classes.

Batched, one step ahead, with rows that join and leave, cancelled and taken up again, the greedy
replies are those of requests that run alone without any cache, and each hit, computed again, is
found right.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass, replace

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from kvserve.core.types import Cut, Event, Finished, GenerationRequest, Prompt, Started
from kvserve.engine.commands import Cancel, Command
from kvserve.engine.loop import EngineLoop
from kvserve.engine.run import Run
from kvserve.engine.scheduler import ChunkSizer
from kvserve.engine.verify import Verifier
from tests.families import zoo
from tests.families.driver import Driver, Tokens, loaded
from tests.families.test_reuse import FAMILIES, tokens

pytestmark = pytest.mark.families

BUDGET = 1 << 28


def one_of_each_combination() -> list[zoo.Family]:
    """Return one family for each combination of cache classes, as the zoo lists them."""
    names = (
        "qwen3", "gemma3_text", "recurrent_gemma-windows", "llama4", "deepseek_v41", "mamba2",
        "qwen3_next", "recurrent_gemma", "gear", "deepseek_v32", "minimax_m3_vl",
        "longcat_flash_ngram", "falcon_h1", "baichuan_m1", "gpt_oss",
    )  # fmt: skip
    by_name = {family.name: family for family in FAMILIES}
    return [by_name[name] for name in names]


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(128)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))


@dataclass
class Reply:
    started: Started | None = None
    finished: Finished | None = None
    error: Exception | None = None

    def take(self, event: Event | Exception) -> None:
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, Finished):
            self.finished = event
        elif isinstance(event, Exception):
            self.error = event

    @property
    def tokens(self) -> Tokens:
        assert self.finished is not None, self.error
        return [int(token) for token in self.finished.token_ids]


class Bench:
    """An engine loop driven by hand on this thread."""

    def __init__(self, family: zoo.Family) -> None:
        model = replace(loaded(zoo.build(family), family.name), tokenizer=word_tokenizer())
        model.batcher.probe(model.fresh_cache, model.vocab_size, 1e-4)
        driver = Driver(model, BUDGET)
        self.cache = driver.cache
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        sizer = ChunkSizer(60.0, 24)
        self.verifier = Verifier(
            model, driver.working, driver.cache, sizer, 1.0, lambda namespace, token_ids: None
        )
        self.loop = EngineLoop(
            model,
            driver.working,
            self.inbox,
            flush=lambda: None,
            max_batch=8,
            sizer=sizer,
            budget_nbytes=BUDGET,
            verifier=self.verifier,
        )

    def submit(
        self, messages: list[Tokens], count: int, use_cache: bool = True
    ) -> tuple[Run, Reply]:
        ids = [token for message in messages for token in message]
        ends = np.cumsum([len(message) for message in messages[:-1]]).tolist()
        prompt = Prompt(np.array(ids, np.uint32), tuple(Cut(e, i) for i, e in enumerate(ends)))
        reply = Reply()
        request = GenerationRequest("test", prompt, count, use_cache=use_cache)
        run = Run(request, reply.take)
        self.inbox.put(run)
        return run, reply

    def finish(self) -> None:
        while self.loop.num_waiting or self.loop.num_running:
            self.loop.advance()
        while self.verifier.step():
            pass
        self.cache.check()
        assert self.verifier.counters.verify_mismatches == 0

    def alone(self, messages: list[Tokens], count: int) -> Tokens:
        _, reply = self.submit(messages, count, use_cache=False)
        self.finish()
        return reply.tokens


@pytest.mark.parametrize("family", one_of_each_combination(), ids=lambda family: family.name)
def test_concurrent_turns_reply_as_if_alone_and_cold(family: zoo.Family) -> None:
    bench = Bench(family)
    system, suffix = tokens(30, 40), tokens(31, 3)
    histories = [[system, tokens(40 + i, 5 + 7 * i)] for i in range(5)]
    for turn in range(3):
        asked = []
        for i, history in enumerate(histories):
            messages = [*history, suffix]
            asked.append((messages, 9 + 5 * i, bench.submit(messages, 9 + 5 * i)[1]))
            bench.loop.advance()  # arrivals come while others prefill and decode
        bench.finish()
        for i, (messages, count, reply) in enumerate(asked):
            assert reply.tokens == bench.alone(messages, count)
            assert reply.started is not None
            if turn:
                held = sum(map(len, messages)) - len(histories[i][-1]) - len(suffix)
                assert reply.started.num_cached >= held - 2
            histories[i] = [*histories[i], [*suffix, *reply.tokens, 99], tokens(60 + i, 6 + turn)]
    assert bench.verifier.counters.verified > 0


@pytest.mark.parametrize("family", one_of_each_combination(), ids=lambda family: family.name)
def test_a_request_that_was_given_up_goes_on_where_it_was_left(family: zoo.Family) -> None:
    bench = Bench(family)
    messages = [tokens(70, 90), tokens(71, 30), tokens(72, 3)]
    other_messages = [tokens(73, 20), tokens(74, 3)]
    run, reply = bench.submit(messages, 30)
    _, other = bench.submit(other_messages, 40)
    while len(run.reply) < 7:
        bench.loop.advance()
    bench.inbox.put(Cancel(run))
    bench.loop.advance()
    assert reply.error is not None
    fed = run.num_fed
    _, again = bench.submit(messages, 30)
    bench.finish()
    assert again.started is not None
    assert again.started.num_cached >= min(fed, 120)
    assert again.tokens == bench.alone(messages, 30)
    assert other.tokens == bench.alone(other_messages, 40)


def test_users_who_ask_about_one_new_document_at_once_cost_one_prefill_of_it() -> None:
    bench = Bench(next(family for family in FAMILIES if family.name == "qwen3"))
    document = tokens(80, 120)
    asked = []
    for i in range(6):
        messages = [document, tokens(81 + i, 6), tokens(90, 3)]
        asked.append((messages, bench.submit(messages, 5)[1]))
    bench.finish()
    assert bench.loop.counters.prefilled_tokens <= 129 + 5 * 12
    for messages, reply in asked:
        assert reply.tokens == bench.alone(messages, 5)
