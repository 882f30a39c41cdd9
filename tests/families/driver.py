"""Runs prompts through the real working caches on this thread and hands out the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvserve.cache.codec import SegmentPayload, arrays_of, traits_of
from kvserve.cache.codec_forms import footprint, forms_of
from kvserve.cache.plan import chunk_end
from kvserve.cache.segments import SegmentCache
from kvserve.core.types import Cut, GenerationRequest, Prompt
from kvserve.engine.batch import Batcher, as_model, install
from kvserve.engine.model import LoadedModel, ModelInfo
from kvserve.engine.run import Run
from kvserve.engine.working import WorkingCaches
from tests.fakes import fake_identity

SEGMENT_TOKENS = 16
Tokens = list[int]


@dataclass
class Outcome:
    """What one request reused and computed. `logits` are those of the prompt's end and of each
    decoded token, `[1 + replies, vocab]`; `path` are all tokens that were fed."""

    reused: int
    logits: mx.array
    path: Tokens


def loaded(network: Any, name: str) -> LoadedModel:
    """Wrap a bare network as the engine would, with no tokenizer."""
    install()
    forward = as_model(network)
    cache = make_prompt_cache(network)
    logits = forward(mx.array([[1, 2, 3]]), cache=cache)
    mx.eval(logits)
    return LoadedModel(
        info=ModelInfo(name, 4096, fake_identity(name), 0, (), True),
        forward=forward,
        tokenizer=cast(Any, None),
        eos_token_ids=frozenset(),
        vocab_size=logits.shape[-1],
        fresh_cache=lambda: make_prompt_cache(network),
        traits=traits_of(make_prompt_cache(network)),
        footprint=footprint(cache),
        forms=forms_of(cache),
        weights_nbytes=0,
        batcher=Batcher(forward),
    )


class Driver:
    """A model with its segment cache; `ask` is one request, `cold` the same without any cache."""

    def __init__(self, model: LoadedModel, budget_nbytes: int = 1 << 30) -> None:
        self.model = model
        self.cache: SegmentCache[SegmentPayload] = SegmentCache(
            model.traits, budget_nbytes, model.footprint.segment
        )
        self.working = WorkingCaches(model, self.cache, SEGMENT_TOKENS)

    def ask(
        self,
        messages: Sequence[Tokens],
        suffix: Tokens,
        reply: Tokens,
        *,
        chunk: int = 24,
        stop_after: int | None = None,
        use_cache: bool = True,
    ) -> Outcome:
        """Prefill messages + suffix, feed `reply`, publish as the engine does.

        `stop_after` leaves in the middle of the prefill, at the first chunk end behind it.
        """
        ends = np.cumsum([len(message) for message in messages]).tolist()
        tokens = [token for message in messages for token in message] + suffix
        prompt = Prompt(np.array(tokens, np.uint32), tuple(Cut(e, i) for i, e in enumerate(ends)))
        request = GenerationRequest("test", prompt, len(reply) + 1, use_cache=use_cache)
        run = Run(request, lambda event: None)
        assert self.working.reserve(run)
        self.working.begin(run)
        reused = run.num_fed
        assert run.plan is not None
        assert run.cache is not None
        logits = []
        while run.num_fed < run.plan.length:
            begin, end = run.num_fed, chunk_end(run.num_fed, run.plan, chunk)
            out = self.model.forward(mx.array(tokens[begin:end])[None], cache=run.cache)
            mx.eval(arrays_of(run.cache))
            run.num_fed = end
            self.working.publish(run, tip=False)
            if stop_after is not None and end >= stop_after:
                break
            if end == run.plan.length:
                logits.append(out[0, -1])
        else:
            for token in reply:
                out = self.model.forward(mx.array([[token]]), cache=run.cache)
                mx.eval(out)
                logits.append(out[0, -1])
                run.reply.append(token)
                run.num_fed += 1
                if self.working.at_cut(run):
                    self.working.publish(run, tip=True)
        self.working.publish(run, tip=True)
        path = run.token_ids[: run.num_fed].tolist()
        self.working.end(run)
        self.cache.check()
        return Outcome(reused, mx.stack(logits) if logits else mx.zeros((0, 1)), path)

    def cold(self, tokens: Tokens) -> mx.array:
        """Return the logits `[tokens, vocab]` of one uncut run on an empty cache."""
        return self.model.forward(mx.array(tokens)[None], cache=self.model.fresh_cache())[0]
