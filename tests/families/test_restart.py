"""After a restart every family goes on from its files: what was computed is reused, and is right.

The real engine over the real store, in three lives: a conversation is begun, regenerated, edited
and forked; each branch goes on in the second life, and once more in the third. What comes back bit
for bit is tested in `test_disk`; here it is what a user of the next process gets.
`RESTART_FAMILIES=all` in the environment takes every family in place of one for each combination
of cache classes.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kvserve.core.types import Cut, Finished, GenerationRequest, Prompt, Started
from kvserve.engine.batch import relative_difference
from kvserve.engine.engine import Engine, EngineSettings
from kvserve.engine.model import LoadedModel
from kvserve.engine.run import Run
from kvserve.store.guards import Limits
from kvserve.store.store import Store
from tests.families import zoo
from tests.families.driver import Tokens, loaded
from tests.families.test_engine_families import one_of_each_combination, word_tokenizer
from tests.families.test_reuse import TOLERANCE, tokens
from tests.store_fakes import conversation

pytestmark = [pytest.mark.families, pytest.mark.anyio]

NAMESPACE = b"tenant"
SUFFIX = [3, 5, 7]
"""What opens a reply; it is not repeated in the history."""
NEWLINE = 99
"""Follows a reply in the history, and was never fed."""
REUSED_SHARE = 0.95
EVERY = os.environ.get("RESTART_FAMILIES") == "all"
CHOSEN = zoo.families() if EVERY else one_of_each_combination()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Life:
    """One process: an engine and the store, with a turn as the server takes it."""

    def __init__(self, engine: Engine, store: Store, exact: bool) -> None:
        self.engine = engine
        self.store = store
        self._exact = exact
        self._evidence: list[mx.array] = []
        assert engine._loop is not None
        engine._loop.verifier.offer = self._note  # type: ignore[method-assign]

    def _note(self, run: Run) -> None:
        if run.evidence is not None:
            self._evidence.append(run.evidence)

    async def turn(
        self, name: str, messages: list[Tokens], count: int = 12
    ) -> tuple[Started, list[Tokens]]:
        """Ask, write what came of it, and return how it started with the history it left."""
        prompt = _prompt(messages)
        path = await self.store.walk(NAMESPACE, prompt.token_ids)
        self._evidence.clear()
        started, finished = await self._run(prompt, count, path)
        ids = np.concatenate([prompt.token_ids, finished.token_ids])
        if self._exact:
            await self._compare(prompt, finished, started)
        held = ids[: finished.num_stored]
        assert len(held) >= len(ids) - 1
        await self._write(name, held)
        reply = [*SUFFIX, *finished.token_ids.tolist(), NEWLINE]
        return started, [*messages, reply]

    async def _run(
        self, prompt: Prompt, count: int, path: object = None, use_cache: bool = True
    ) -> tuple[Started, Finished]:
        request = GenerationRequest("test", prompt, count, NAMESPACE, use_cache=use_cache)
        started = finished = None
        async for event in self.engine.submit(request, path):  # type: ignore[arg-type]
            if isinstance(event, Started):
                started = event
            elif isinstance(event, Finished):
                finished = event
        assert started is not None and finished is not None
        return started, finished

    async def _compare(self, prompt: Prompt, finished: Finished, started: Started) -> None:
        """The reply and the logits behind the prompt must be those of a cold run."""
        _, cold = await self._run(prompt, len(finished.token_ids), use_cache=False)
        assert finished.token_ids.tolist() == cold.token_ids.tolist()
        if not started.num_cached:
            return
        (evidence,) = self._evidence

        def difference() -> float:
            model = self.engine.model
            fed = mx.array(prompt.token_ids)[None]
            logits = model.forward(fed, cache=model.fresh_cache())
            return float(relative_difference(evidence, logits[0, -1]))

        assert await self.engine.call(difference) <= TOLERANCE

    async def _write(self, name: str, held: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> None:
        stored = conversation(name, held, namespace=NAMESPACE, identity=self.engine.info.identity)
        lease = self.engine.hold(NAMESPACE, held)
        try:
            sources = partial(self.engine.sources, lease)
            written = await self.store.write(stored, sources, by_order=False)
        finally:
            self.engine.release(lease)
        assert written.num_tokens == len(held)


def _prompt(messages: list[Tokens]) -> Prompt:
    ids = [token for message in messages for token in message] + SUFFIX
    ends = np.cumsum([len(message) for message in messages]).tolist()
    return Prompt(np.array(ids, np.uint32), tuple(Cut(e, i) for i, e in enumerate(ends)))


@asynccontextmanager
async def life(folder: Path, family: zoo.Family) -> AsyncIterator[Life]:
    """A process of the family's model on the data folder."""

    def load() -> LoadedModel:
        model = replace(loaded(zoo.build(family), family.name), tokenizer=word_tokenizer())
        model.batcher.probe(model.fresh_cache, model.vocab_size, 1e-4)
        return model

    settings = EngineSettings(budget_nbytes=1 << 28, segment_tokens=32, verify_share=1.0)
    engine = Engine(load, settings)
    await engine.start()
    try:
        store = await Store.open(folder, identity=engine.info.identity, limits=Limits())
        reported: list[tuple[int, str]] = []
        engine.attach_disk(store.read, lambda run_id, why: reported.append((run_id, why)))
        try:
            yield Life(engine, store, family.name not in zoo.CHUNKING_DIFFERS)
        finally:
            await store.aclose()
    finally:
        await engine.stop()
    assert not reported
    assert engine.stats()["failed_restores"] == 0


@pytest.mark.parametrize("family", CHOSEN, ids=lambda family: family.name)
async def test_every_branch_goes_on_after_a_restart_with_its_tail_only(
    family: zoo.Family, tmp_path: Path
) -> None:
    begun = [tokens(1, 90), tokens(2, 110)]
    branches: dict[str, list[Tokens]] = {}
    async with life(tmp_path, family) as first:
        _, history = await first.turn("straight", begun)
        question = [*history, tokens(3, 60)]
        _, branches["straight"] = await first.turn("straight", question)
        _, branches["regenerated"] = await first.turn("regenerated", question, 17)
        edited = [*history, [*tokens(3, 20), *tokens(4, 45)]]
        _, branches["edited"] = await first.turn("edited", edited)
        _, branches["forked"] = await first.turn("forked", [*begun[:1], tokens(5, 130)])
    for number, names in enumerate((list(branches), ["edited", "forked"]), start=6):
        async with life(tmp_path, family) as later:
            for i, name in enumerate(names):
                history = branches[name]
                asked = [*history, tokens(10 * number + i, 5)]
                started, branches[name] = await later.turn(name, asked)
                known = sum(map(len, history)) - 1  # the newline was never fed
                assert started.num_cached >= known - 1, (name, started, known)
                assert started.num_cached >= REUSED_SHARE * len(_prompt(asked))
                assert not started.damaged
                # Others of its tree may have brought the beginning; its own end came from disk.
                assert started.num_from_disk > 0


@pytest.mark.parametrize("family", CHOSEN, ids=lambda family: family.name)
async def test_a_question_is_asked_again_or_in_another_way_after_a_restart(
    family: zoo.Family, tmp_path: Path
) -> None:
    begun = [tokens(21, 150), tokens(22, 40)]
    async with life(tmp_path, family) as first:
        _, history = await first.turn("chat", begun)
        _, longer = await first.turn("chat", [*history, tokens(23, 30)])
    async with life(tmp_path, family) as second:
        # Regenerated: to the end of the last message at least; one more token is always fed.
        started, _ = await second.turn("again", longer[:-1])
        assert started.num_cached >= len(_prompt(longer[:-1])) - len(SUFFIX)
        started, _ = await second.turn("edited", [*history, tokens(24, 30)])
        assert started.num_cached >= sum(map(len, history)) - 2
        started, _ = await second.turn("other", [begun[0], tokens(25, 30)])
        assert started.num_cached >= len(begun[0])
