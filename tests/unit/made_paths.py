"""Random prompts that share prefixes, for the replay and for the cache that it stands for."""

from __future__ import annotations

from hypothesis import strategies as st

from scripts.replay.requests import Request


def requests_of(paths: list[tuple[int, ...]]) -> list[Request]:
    """Return requests for paths of small numbers; a block is named by all up to it."""
    names: dict[tuple[int, ...], int] = {}
    requests = []
    for at, path in enumerate(paths):
        blocks = [names.setdefault(path[: n + 1], len(names)) for n in range(len(path))]
        requests.append(Request(float(at), tuple(blocks), 1 + at % 3))
    return requests


PATHS = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=40
)
