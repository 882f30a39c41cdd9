"""The identity of a model: everything that its KV states depend on, in one digest.

Weights are hashed whole (XXH3, as fast as the disk), once: digests are remembered by file name,
size and modification time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import xxhash

_HASHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
_BLOCK = 1 << 24


def fingerprint(folder: Path, adapter: Path | None, dtype: str, memory: Path | None = None) -> str:
    """Return 32 hex digits for the files of a model and its adapter, and the computing type.

    `memory` is a JSON file of earlier digests; an unreadable one costs hashing anew.
    """
    known = _remembered(memory)
    hasher = xxhash.xxh3_128()
    for root in (folder, adapter):
        hasher.update(b"root")
        if root is None:
            continue
        for path in sorted({path for pattern in _HASHED for path in root.glob(pattern)}):
            stat = path.stat()
            stamp = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
            if stamp not in known:
                known[stamp] = _digest(path)
            hasher.update(f"{path.name}\0{known[stamp]}\0".encode())
    hasher.update(dtype.encode())
    _remember(memory, known)
    return hasher.hexdigest()


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
