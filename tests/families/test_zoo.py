"""The zoo itself: complete, deterministic, and made of models in which every cached array matters.

These tests run mlx-lm alone. They say what the other families tests may rely on: that feeding a
prompt in pieces gives the logits of feeding it whole, and for which families mlx-lm breaks that.
"""

import ast
import copy
import importlib.util
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from tests.families import zoo
from tests.families.zoo.weights import parameters

pytestmark = pytest.mark.families

PIECES = (13, 27, 40, 41, 42, 43, 44, 45)
"""Ends of the pieces: three chunks of prefill, none a multiple of a window, then five steps."""
LENGTH = PIECES[-1]
LONG = 200
TOLERANCE = 1e-4
"""Relative to the largest logit. Measured on a CPU: at most 2e-6."""
MATTERS = 1e-3

FAMILIES = {family.name: family for family in zoo.families()}
BATCHABLE = sorted(FAMILIES.keys() - zoo.BATCHING_DIFFERS.keys())

COMBINATIONS = {
    "ArraysCache",
    "ArraysCache CacheList(KVCache,KVCache)",
    "ArraysCache KVCache",
    "ArraysCache KVCache RotatingKVCache",
    "ArraysCache RotatingKVCache",
    "CacheList(ArraysCache,KVCache)",
    "CacheList(ArraysCache,KVCache) CacheList(ArraysCache,RotatingKVCache)",
    "CacheList(KVCache) CacheList(KVCache,KVCache)",
    "CacheList(KVCache,KVCache)",
    "ChunkedKVCache KVCache",
    "KVCache",
    "KVCache RotatingKVCache",
    "LayerCache",
    "RotatingKVCache",
}


@pytest.fixture(autouse=True, scope="module")
def _on_the_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)
    model.cache_clear()
    whole.cache_clear()


@cache
def model(name: str) -> Module:
    return zoo.build(FAMILIES[name])


def tokens(length: int, seed: int = 1) -> mx.array:
    """Return `[1, length]` random token ids in [1, vocabulary)."""
    return mx.random.randint(1, zoo.VOCABULARY, (1, length), key=mx.random.key(seed))


def changed(prompt: mx.array, place: int = 2) -> mx.array:
    """Return a copy of `prompt` with another token at `place`."""
    other = mx.array(prompt)
    other[0, place] = other[0, place] % (zoo.VOCABULARY - 2) + 1
    return other


def fed(name: str, prompt: mx.array, prompt_cache: list[Any]) -> mx.array:
    """Feed `prompt` and return the logits `[rows, tokens, vocabulary]`, evaluated."""
    logits = model(name)(prompt, cache=prompt_cache)
    mx.eval(logits)
    return mx.array(logits)


@cache
def whole(name: str) -> mx.array:
    """Return the logits of the common prompt, fed at once."""
    return fed(name, tokens(LENGTH), make_prompt_cache(model(name)))


def pieces(name: str) -> mx.array:
    """Return the logits of the common prompt, fed piece by piece."""
    prompt, prompt_cache = tokens(LENGTH), make_prompt_cache(model(name))
    starts = (0, *PIECES[:-1])
    parts = [
        fed(name, prompt[:, start:end], prompt_cache)
        for start, end in zip(starts, PIECES, strict=True)
    ]
    return mx.concatenate(parts, axis=1)


def number(value: mx.array) -> float:
    """Return the one real number that `value` holds."""
    item = value.item()
    assert not isinstance(item, complex)
    return item


def apart(left: mx.array, right: mx.array) -> float:
    """Return the largest difference, relative to the largest logit of `right`."""
    assert mx.isfinite(left).all().item()
    assert mx.isfinite(right).all().item()
    return number(mx.abs(left - right).max() / mx.abs(right).max())


def kind(layer_cache: Any) -> str:
    """Return the class of a cache, and for a `CacheList` those of its members."""
    name = type(layer_cache).__name__
    if name != "CacheList":
        return name
    return f"{name}({','.join(kind(member) for member in layer_cache.caches)})"


def kinds(name: str) -> Counter[str]:
    """Return how many caches of each kind the family's prompt cache has."""
    return Counter(kind(layer_cache) for layer_cache in make_prompt_cache(model(name)))


def arrays(layer_cache: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield `(path, container, key)` of every array that a cache holds, `CacheList`s walked."""
    if type(layer_cache).__name__ == "CacheList":
        for place, member in enumerate(layer_cache.caches):
            yield from arrays(member, f"{path}.{place}")
        return
    is_arrays = type(layer_cache).__name__ == "ArraysCache"
    held = dict(enumerate(layer_cache.cache)) if is_arrays else vars(layer_cache)
    for key, value in held.items():
        if isinstance(value, mx.array) and value.size:
            yield f"{path}.{key}", layer_cache.cache if is_arrays else vars(layer_cache), key


def installed_types() -> set[str]:
    """Return the modules of `mlx_lm.models` that define or import a class `Model`.

    They are read, not imported: one of them ends the process when imported.
    """
    spec = importlib.util.find_spec("mlx_lm.models")
    assert spec is not None
    assert spec.submodule_search_locations
    found = set()
    for path in Path(spec.submodule_search_locations[0]).glob("*.py"):
        names: set[str] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.ImportFrom):
                names.update(alias.asname or alias.name for alias in node.names)
        if "Model" in names:
            found.add(path.stem)
    return found


def test_every_model_type_of_mlx_lm_is_in_the_zoo_or_left_out_with_a_reason() -> None:
    held = {family.model_type for family in FAMILIES.values()}
    assert held | zoo.LEFT_OUT.keys() == installed_types()
    assert not held & zoo.LEFT_OUT.keys()
    assert len(held) >= 60


def test_names_are_unique_and_every_exception_names_a_family() -> None:
    assert len(FAMILIES) == len(zoo.families())
    for exceptions in (zoo.CHUNKING_DIFFERS, zoo.BATCHING_DIFFERS, zoo.OUT_OF_REACH):
        assert exceptions.keys() <= FAMILIES.keys()


def test_build_depends_on_the_seed_and_on_nothing_else() -> None:
    family = FAMILIES["jamba"]
    first, again, other = (parameters(zoo.build(family, seed)) for seed in (3, 3, 4))
    assert all(mx.array_equal(first[name], again[name]).item() for name in first)
    assert not any(mx.array_equal(first[name], other[name]).item() for name in first)


def test_the_zoo_covers_every_known_combination_of_cache_classes() -> None:
    families_of: dict[str, list[str]] = {}
    for name in FAMILIES:
        families_of.setdefault(" ".join(sorted(kinds(name))), []).append(name)
    for combination, names in sorted(families_of.items()):
        print(f"{combination}: {', '.join(names)}")
    assert families_of.keys() == COMBINATIONS


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_float32(name: str) -> None:
    types = {value.dtype for value in parameters(model(name)).values()}
    assert types == {mx.float32}


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - zoo.CHUNKING_DIFFERS.keys()))
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(name: str) -> None:
    assert apart(pieces(name), whole(name)) <= TOLERANCE


@pytest.mark.parametrize("name", zoo.CHUNKING_DIFFERS)
def test_the_exceptions_to_chunking_are_still_exceptions(name: str) -> None:
    assert apart(pieces(name), whole(name)) > TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_an_early_token_changes_the_last_logits(name: str) -> None:
    other = fed(name, changed(tokens(LENGTH)), make_prompt_cache(model(name)))
    difference = apart(other[:, -1], whole(name)[:, -1])
    if name in zoo.OUT_OF_REACH:
        assert difference <= TOLERANCE
    else:
        assert difference >= MATTERS


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_differ_between_tokens_and_stay_finite_over_a_long_prompt(name: str) -> None:
    logits = fed(name, tokens(LONG), make_prompt_cache(model(name)))
    assert mx.isfinite(logits).all().item()
    assert number(mx.abs(logits).max()) < 1e3
    assert number(logits[0, -1].std()) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_every_cached_array_reaches_the_logits(name: str) -> None:
    prompt, prompt_cache = tokens(31), make_prompt_cache(model(name))
    fed(name, prompt[:, :15], prompt_cache)
    fed(name, prompt[:, 15:28], prompt_cache)

    def continued(caches: list[Any]) -> mx.array:
        steps = [fed(name, prompt[:, place : place + 1], caches) for place in range(28, 31)]
        return mx.concatenate(steps, axis=1)

    right = continued(copy.deepcopy(prompt_cache))
    unread = []
    for number in range(len(prompt_cache)):
        for path, _, _ in arrays(prompt_cache[number], str(number)):
            spoilt = copy.deepcopy(prompt_cache)
            places = {
                other: (held, key) for other, held, key in arrays(spoilt[number], str(number))
            }
            held, key = places[path]
            value = held[key]
            held[key] = -value if value.dtype == mx.float32 else (value + 1) % zoo.VOCABULARY
            if apart(continued(spoilt), right) < MATTERS:
                unread.append(path)
    if name in zoo.NEVER_READ:
        assert unread == [f"{number}.1.values" for number in range(len(prompt_cache))]
    else:
        assert not unread


@pytest.mark.parametrize("name", BATCHABLE)
def test_prompts_of_two_lengths_decode_together_as_alone(name: str) -> None:
    short, long = tokens(30, seed=2), tokens(41, seed=3)
    alone = [make_prompt_cache(model(name)) for _ in range(2)]
    fed(name, short, alone[0])
    fed(name, long, alone[1])
    together = [type(left).merge([left, right]) for left, right in zip(*alone, strict=True)]
    for step in range(3):
        pair = mx.concatenate([tokens(1, seed=10 + step), tokens(1, seed=20 + step)])
        expected = [fed(name, pair[row : row + 1], alone[row]) for row in range(2)]
        assert apart(fed(name, pair, together), mx.concatenate(expected)) <= TOLERANCE
