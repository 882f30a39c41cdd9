"""Values that pass between the parts: prompts, sampling parameters, generation events.

All are immutable and free of MLX. Token positions are half-open ranges counted from the start of
the prompt; token ids are `numpy.uint32`, because keys made of them outlive the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Cut:
    """A position in a prompt at which state may be taken up again: the end of a message.

    `position` is the number of tokens before it, `message` the index of the message that ends
    there.
    """

    position: int
    message: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered and tokenised request.

    `cuts` are the message ends in ascending order, each in `(0, len(token_ids)]`; what lies behind
    the last one is the suffix that opens the reply.
    """

    token_ids: TokenIds
    cuts: tuple[Cut, ...] = ()

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy and change nothing.

    `temperature` 0 is greedy. `top_p` in (0, 1], `top_k` 0 for all, `min_p` in [0, 1].
    `repetition_penalty` above 0, 1 for none; `presence_penalty` and `frequency_penalty` in
    [-2, 2]. `logit_bias` maps token ids to additions in [-100, 100]. The same `seed`, prompt and
    parameters give the same reply on the same machine.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One reply to be generated.

    `namespace` separates callers: states are shared only between requests of equal namespace.
    `stop` strings end the reply and are not part of it. With `use_cache` off nothing is reused
    and nothing is kept. With `max_tokens` 0 the prompt is prefilled and nothing else.
    """

    request_id: str
    prompt: Prompt
    max_tokens: int
    namespace: bytes = b""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    use_cache: bool = True


class FinishReason(StrEnum):
    """Why a reply ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Started:
    """The request has been admitted and its prefill begins.

    `num_cached` prompt tokens come from stored state, `num_prefill` are computed; their sum is
    the length of the prompt. `num_from_disk` of the former were read from disk; `damaged` says
    that more would have been, had a file not been damaged.
    """

    num_cached: int
    num_prefill: int
    num_from_disk: int = 0
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text to append to the reply; `num_tokens` tokens generated so far. Never half a character."""

    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The reply is complete.

    `token_ids` are all generated tokens, an end-of-turn token included. `num_stored` is how many
    tokens of prompt + reply now lie in the cache, counted from the start; those that were reused
    may lie on disk only.
    """

    reason: FinishReason
    token_ids: TokenIds
    num_stored: int
    ttft_s: float
    decode_s: float


Event = Started | TextPiece | Finished
