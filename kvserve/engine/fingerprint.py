"""The identity of a model: everything that its KV states depend on, each thing by itself.

Read from the files that loading reads, by content: where a folder lies and when it was written do
not count, nor do files that no state depends on (a README, sampling defaults). Large files are
hashed whole (XXH3, as fast as the disk), once: digests are remembered in a file, under the path,
size and times of what they were made from. Owns nothing else; engine thread.

A change that might not matter (another line in config.json) counts: a miss costs a prefill, a
state used with the wrong model a wrong reply.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from kvserve.core.identity import ModelIdentity
from kvserve.core.keys import LAYOUT_VERSION

_WEIGHTS = ("model*.safetensors",)
"""What mlx-lm loads. Other safetensors lie in folders too: the vendor's own form of the same
weights, adapters."""
_ADAPTER = ("adapters.safetensors",)
_VOCABULARIES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "*vocab*.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
_QUANTISATION = ("quantization", "quantization_config")
_PROVENANCE = ("_name_or_path", "name_or_path", "transformers_version")
"""Settings that say where a file comes from, and nothing of what it does."""
_BLOCK = 1 << 24


def identify(
    folder: Path,
    *,
    adapter: Path | None = None,
    chat_template: str | Mapping[str, str] | None,
    kv_dtype: str,
    runs_own_code: bool = False,
    memory: Path | None = None,
) -> ModelIdentity:
    """Return what identifies the states of the model in `folder` with the adapter in `adapter`.

    `chat_template` is the loaded tokenizer's (several by name for some models), `kv_dtype` the
    number format of a working cache. With `runs_own_code` the Python files of the folder are the
    model. `memory` is a JSON file of earlier digests; an unreadable one costs hashing anew.
    """
    known = _remembered(memory)
    config = _settings(folder / "config.json")
    quantisation, config = _quantisation(config, _settings(folder / "hf_quant_config.json"))
    code = _named(folder, ("*.py",), known) if runs_own_code else {}
    tokenizer = _settings(folder / "tokenizer_config.json")
    tokenizer.pop("chat_template", None)  # of several sources; counted by itself
    identity = ModelIdentity(
        weights=_digest_of(sorted(_named(folder, _WEIGHTS, known).values())),
        config=_digest_of([_without(config, _PROVENANCE), code]),
        quantisation=_digest_of(quantisation) if quantisation else "none",
        adapter=_adapter(adapter, known),
        tokenizer=_digest_of(
            [_without(tokenizer, _PROVENANCE), _named(folder, _VOCABULARIES, known)]
        ),
        chat_template=_digest_of(chat_template),
        kv_dtype=kv_dtype,
        layout=str(LAYOUT_VERSION),
    )
    _remember(memory, known)
    return identity


def _quantisation(
    config: dict[str, Any], apart: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters of quantisation, {} if there are none, and the config without them.

    They stand in the config, in its part for text, or in a file of their own (`apart`).
    """
    text = config.get("text_config")
    parts = {"": config, "text_config": text if isinstance(text, dict) else {}}
    found = {
        f"{part}.{name}": settings[name]
        for part, settings in parts.items()
        for name in _QUANTISATION
        if settings.get(name)
    }
    rest = _without(config, _QUANTISATION)
    if parts["text_config"]:
        rest["text_config"] = _without(parts["text_config"], _QUANTISATION)
    return ({**found, "apart": apart} if apart else found), rest


def _adapter(folder: Path | None, known: dict[str, str]) -> str:
    if folder is None:
        return ""
    config = _settings(folder / "adapter_config.json")
    return _digest_of([config, sorted(_named(folder, _ADAPTER, known).values())])


def _without(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _settings(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is none.

    Loading has come through, so a file that is no JSON object is one that it does without.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _digest_of(value: object) -> str:
    """Return 32 hex digits for a JSON value; the order of an object's names does not count."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _named(folder: Path, patterns: Iterable[str], known: dict[str, str]) -> dict[str, str]:
    """Return the digests of the files that match, by name; `known` has them by stamp."""
    digests = {}
    for path in {path for pattern in patterns for path in folder.glob(pattern)}:
        if not path.is_file():
            continue
        stat, place = path.stat(), f"{path.resolve()}|"
        # The time of the last change too: who replaces a file may give it the old one's age.
        stamp = f"{place}{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
        if stamp not in known:
            for outdated in [other for other in known if other.startswith(place)]:
                del known[outdated]
            known[stamp] = _digest(path)
        digests[path.name] = known[stamp]
    return digests


def _digest(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


def _remembered(memory: Path | None) -> dict[str, str]:
    if memory is None:
        return {}
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in known.items()} if isinstance(known, dict) else {}


def _remember(memory: Path | None, known: dict[str, str]) -> None:
    if memory is None:
        return
    try:
        memory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = memory.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(known), encoding="utf-8")
        draft.replace(memory)
    except OSError:
        return  # a read-only data folder costs hashing at every start, nothing else
