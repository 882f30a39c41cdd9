"""Keys outlive the process: their bytes are fixed, and unequal inputs give unequal keys."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from kvserve.core.keys import prefix_key, root_key

ROOT = root_key("weights", b"tenant")


def test_keys_do_not_change_between_releases() -> None:
    assert ROOT.hex() == "4d788cab08906d610b84ddc8406bc311"
    ids = np.array([0, 1, 258, 2**32 - 1], np.uint32)
    assert prefix_key(ROOT, ids).hex() == "e4f796348423a302270418b784c9bb2a"


def test_a_key_depends_on_the_ids_and_not_on_how_an_array_holds_them() -> None:
    ids = np.array([7, 65536, 12], np.uint32)
    key = prefix_key(ROOT, ids)
    assert prefix_key(ROOT, ids.astype(">u4")) == key
    assert prefix_key(ROOT, ids.astype(np.int64).astype(np.uint32)) == key
    assert prefix_key(ROOT, np.array([7, 0, 65536, 0, 12, 0], np.uint32)[::2]) == key
    assert prefix_key(ROOT, ids[:2]) != key


def test_fields_do_not_run_together() -> None:
    roots = [
        root_key(fingerprint, namespace)
        for fingerprint, namespace in [
            ("ab", b"c"),
            ("a", b"bc"),
            ("abc", b""),
            ("", b"abc"),
            ("", b""),
            ("abc", b"\0"),
            ("abc", b"\0\0"),
        ]
    ]
    assert all(a != b for a, b in combinations(roots, 2))
    ids = np.arange(3, dtype=np.uint32)
    keys = [prefix_key(root, ids) for root in roots]
    assert all(a != b for a, b in combinations(keys, 2))
