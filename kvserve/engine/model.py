"""Loading a model: from a folder or the hub, checked, identified, and tried out.

Runs on the engine thread, which owns the result. Knows what mlx-lm cannot promise: families whose
state depends on how the prompt was cut, and Linux CPUs where half precision is 40 times slower
than float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_adapters, load_model, load_tokenizer
from transformers import PreTrainedTokenizerBase

from kvserve.cache.codec import WorkingCache, arrays_of, traits_of
from kvserve.cache.codec_forms import Footprint, Forms, footprint, forms_of
from kvserve.cache.plan import Traits
from kvserve.core.errors import KvserveError
from kvserve.core.identity import ModelIdentity
from kvserve.engine.batch import Batcher, as_model, install
from kvserve.engine.fingerprint import identify
from kvserve.engine.selfcheck import caching_fault

DEFAULT_CONTEXT = 4096
SPARE_BUFFERS_NBYTES = 1 << 30
"""MLX keeps freed buffers for reuse, without bound unless told; this much is enough for a chunk."""
_PATTERNS = ("*.json", "model*.safetensors", "*.jinja", "*.txt", "*.jsonl", "*.model", "tokenizer*")


class ModelError(KvserveError):
    """The model cannot be loaded; the message is for the person who starts the server."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the rest of the server may know of the model."""

    name: str
    context_length: int
    identity: ModelIdentity
    created: int
    notes: tuple[str, ...]
    caching: bool

    @property
    def fingerprint(self) -> str:
        return self.identity.digest()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run. Everything in it belongs to the engine thread but `info`."""

    info: ModelInfo
    forward: Callable[..., mx.array]
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    vocab_size: int
    fresh_cache: Callable[[], WorkingCache]
    traits: Traits
    footprint: Footprint
    forms: Forms
    weights_nbytes: int
    batcher: Batcher


def resolve(model: str) -> Path:
    """Return the folder of a local model, or download one from the hub with a progress bar.

    Raises ModelError in words when there is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(f"no model folder at {model!r}, and it is not a hub id like 'owner/name'")
    try:
        return Path(snapshot_download(model, allow_patterns=list(_PATTERNS)))
    except HFValidationError as error:
        raise ModelError(f"{model!r} is neither a folder nor a hub id like 'owner/name'") from error
    except (HfHubHTTPError, OSError) as error:
        reason = type(error).__name__
        raise ModelError(f"model {model!r} could not be downloaded ({reason})") from error


def load(
    folder: Path,
    *,
    name: str,
    adapter: Path | None = None,
    max_context: int | None = None,
    fingerprints: Path | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load, check and warm up the model in `folder`.

    `fingerprints` is a file in which digests of weight files are remembered by size and time.
    Raises ModelError.
    """
    network, config, wrapped = _read(folder, adapter, trust_remote_code)
    mx.set_cache_limit(SPARE_BUFFERS_NBYTES)
    if mx.default_device() == mx.cpu:
        network.set_dtype(mx.float32)
        mx.eval(network.parameters())
    install()
    forward = as_model(network)
    tokenizer: PreTrainedTokenizerBase = wrapped._tokenizer

    def fresh() -> WorkingCache:
        cache: WorkingCache = make_prompt_cache(network)
        return cache

    vocab_size, used = _warm_up(forward, fresh)
    notes: list[str] = []
    fault = caching_fault(config, forward, fresh, vocab_size)
    if fault:
        notes.append(f"CACHING IS OFF for this model: {fault}")
    batcher = Batcher(forward)
    why = batcher.probe(fresh, vocab_size, _tolerance(network))
    if why:
        notes.append(f"decode runs row by row: {why}")
    context, guessed = _context_length(config)
    if guessed:
        notes.append(f"the config names no context length; {context} is assumed")
    info = ModelInfo(
        name=name,
        context_length=min(context, max_context or context),
        identity=identify(
            folder,
            adapter=adapter,
            chat_template=tokenizer.chat_template,
            kv_dtype=_number_formats(used),
            runs_own_code=config.get("model_file") is not None,
            memory=fingerprints,
        ),
        created=int(time.time()),
        notes=tuple(notes),
        caching=not fault,
    )
    return LoadedModel(
        info=info,
        forward=forward,
        tokenizer=tokenizer,
        eos_token_ids=frozenset(int(i) for i in wrapped.eos_token_ids),
        vocab_size=vocab_size,
        fresh_cache=fresh,
        traits=traits_of(fresh()),
        footprint=footprint(used),
        forms=forms_of(used),
        weights_nbytes=sum(a.nbytes for _, a in _parameters(network)),
        batcher=batcher,
    )


def _read(
    folder: Path, adapter: Path | None, trust_remote_code: bool
) -> tuple[Any, dict[str, Any], Any]:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder.name}: there is no config.json, so this is not a model folder")
    try:
        network, config = load_model(folder, lazy=False, trust_remote_code=trust_remote_code)
        if adapter is not None:
            network = load_adapters(network, str(adapter))
            network.eval()
        read_tokenizer: Callable[..., Any] = load_tokenizer
        wrapped = read_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except (Exception, SystemExit) as error:  # model files raise anything; olmo calls sys.exit
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ModelError(f"{folder.name} cannot be loaded: {what[:500]}") from error
    return network, config, wrapped


def _warm_up(
    forward: Callable[..., mx.array], fresh: Callable[[], WorkingCache]
) -> tuple[int, WorkingCache]:
    """Run a few tokens; return the width of the logits and the working cache that holds them."""
    cache = fresh()
    logits = forward(mx.array([[1, 2, 3]]), cache=cache)
    mx.eval(logits)
    return logits.shape[-1], cache


def _number_formats(cache: WorkingCache) -> str:
    """Return the names of the number formats in which a model holds its state."""
    formats = {str(array.dtype).removeprefix("mlx.core.") for array in arrays_of(cache)}
    return "+".join(sorted(formats))


def _parameters(network: Any) -> list[tuple[str, mx.array]]:
    pairs: Any = tree_flatten(network.parameters())
    return list(pairs)


def _dtype(network: Any) -> mx.Dtype:
    """Return the type of the weights that are not quantised."""
    for _, array in _parameters(network):
        if mx.issubdtype(array.dtype, mx.floating):
            return array.dtype
    return mx.float32


def _tolerance(network: Any) -> float:
    """Return how far logits may differ between two ways of computing them."""
    return 1e-3 if _dtype(network) == mx.float32 else 5e-2


def _context_length(config: dict[str, Any]) -> tuple[int, bool]:
    """Return the context length that the config states, and whether it had to be guessed."""
    for part in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            value = part.get(key)
            if isinstance(value, int) and value > 1:
                return value, False
    return DEFAULT_CONTEXT, True
