"""Imports point down: one list of layers, one list of pure modules, one list of users of MLX."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ["cli", "app", "config", "api", "chat", "engine", "cache", "store", "core", "embedded"]
PURE = {
    *("core.types", "core.errors", "core.identity", "chat.cuts", "chat.miss", "engine.scheduler"),
    *("chat.branching", "chat.holdings", "chat.records", "chat.refusals"),
    *("cache.tree", "cache.policy", "cache.eviction", "cache.plan", "cache.stored"),
    *("store.layout", "store.slicing", "store.snapshot_header", "store.guards"),
}
IMPURE = {"mlx", "mlx_lm", "time", "datetime", "threading", "asyncio", "os", "pathlib", "random"}
MLX_USERS = ("engine.*", "cache.codec*")


def imports(source: str) -> Iterator[str]:
    """Yield the full names that `source` imports when it runs, those in functions included."""
    waiting: list[ast.AST] = [ast.parse(source)]
    for node in waiting:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module}.{alias.name}" for alias in node.names)
        else:
            waiting += ast.iter_child_nodes(node)


def faults(module: str, source: str) -> list[str]:
    """Return what `module`, named from below `kvserve`, imports against the rules."""
    found = []
    layer = module.partition(".")[0]
    for name in imports(source):
        top, _, rest = name.partition(".")
        below = rest.partition(".")[0]
        if top == "":
            found.append(f"{module}: write relative import {name} in full")
        if top == "kvserve" and below in LAYERS and layer in LAYERS:
            if LAYERS.index(below) < LAYERS.index(layer):
                found.append(f"{module}: {name} lies above it")
            if below == "config" and layer not in ("cli", "app", "config"):
                found.append(f"{module}: settings are for cli and app")
        if top in IMPURE and module in PURE:
            found.append(f"{module} is pure and imports {name}")
        if top in ("mlx", "mlx_lm") and not any(fnmatch(module, user) for user in MLX_USERS):
            found.append(f"{module}: {name} is for {', '.join(MLX_USERS)}")
    return found


def test_every_import_points_down() -> None:
    found = []
    for path in sorted((ROOT / "kvserve").rglob("*.py")):
        parts = path.relative_to(ROOT / "kvserve").with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if module and module != "__main__":
            assert parts[0] in LAYERS, f"kvserve/{parts[0]} has no place in the list of layers"
            found += faults(module, path.read_text(encoding="utf-8"))
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.types", "from kvserve.cache import tree"),
        ("engine.loop", "from kvserve import api"),
        ("cache.tree", "def f():\n    import kvserve.chat.turn"),
        ("chat.turn", "from kvserve.config import Settings"),
        ("api.routes", "import mlx.core as mx"),
        ("cache.segments", "from mlx_lm.models.cache import KVCache"),
        ("engine.scheduler", "import time"),
        ("cache.plan", "from os import path"),
        ("chat.turn", "from .miss import reason"),
        ("store.files", "if TYPE_CHECKING:\n    pass\nelse:\n    import kvserve.app"),
    ],
)
def test_a_bad_import_is_seen(module: str, source: str) -> None:
    assert faults(module, source)


def test_an_import_for_the_type_checker_alone_is_allowed() -> None:
    assert not faults("cache.tree", "if TYPE_CHECKING:\n    from kvserve.engine import model")
