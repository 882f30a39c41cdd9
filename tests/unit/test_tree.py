"""The tree: walking by tokens, splitting without losing anything, and windows that have holes."""

from __future__ import annotations

import numpy as np
import pytest

from kvserve.cache.tree import Node, Tree, common_prefix, holds_window, restorable_position
from kvserve.core.types import TokenIds
from tests.property.fake_state import Fake, Kind, Tokens, Working

PLAIN = Kind(span=True)


def ids(tokens: str | Tokens) -> TokenIds:
    return np.array([ord(t) if isinstance(t, str) else t for t in tokens], np.uint32)


def grown(kind: Kind, *paths: str) -> Tree[Fake]:
    """Return a tree that holds `paths`, split where they part; `|` in a path is a cut."""
    tree: Tree[Fake] = Tree()
    for path in paths:
        text = path.replace("|", "")
        codes = tuple(map(ord, text))
        end = 0
        for piece in path.split("|"):
            end += len(piece)
            node, matched = tree.walk(ids(text[:end]))
            if matched < node.end:
                node = tree.split(node, matched)
            if matched < end:
                payload = Working(kind, b"", codes, end).capture(matched, end, True, False)
                tree.add(node, ids(text[matched:end]), payload)
    return tree


def text_of(node: Node[Fake]) -> str:
    return "".join(map(chr, node.token_ids().tolist()))


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [("", "", 0), ("a", "", 0), ("a", "b", 0), ("ab", "ac", 1), ("ab", "abc", 2), ("ab", "ab", 2)],
)
def test_common_prefix_counts_leading_tokens(a: str, b: str, shared: int) -> None:
    assert common_prefix(ids(a), ids(b)) == common_prefix(ids(b), ids(a)) == shared


def test_walk_finds_the_longest_path_and_where_it_parts() -> None:
    tree = grown(PLAIN, "system|hello", "system|help", "other")
    for prompt, path, matched in [
        ("", "", 0),
        ("x", "", 0),
        ("sys", "system", 3),
        ("systems", "system", 6),
        ("systemhello there", "systemhello", 11),
        ("systemhelium", "systemhel", 9),
        ("systemhelp", "systemhelp", 10),
        ("othello", "other", 4),
    ]:
        node, found = tree.walk(ids(prompt))
        assert (text_of(node), found) == (path, matched)


def test_walk_takes_up_at_a_known_node() -> None:
    tree = grown(PLAIN, "ab|cd|ef")
    origin, _ = tree.walk(ids("abcd"))
    node, matched = tree.walk(ids("abcdex"), origin)
    assert (text_of(node), matched) == ("abcdef", 5)
    node, matched = tree.walk(ids("abcx"), origin)
    assert (text_of(node), matched) == ("abcd", 3)


def test_walk_does_not_take_bytes_for_tokens() -> None:
    tree: Tree[Fake] = Tree()
    codes = (1, 256, 65536)
    tree.add(tree.root, ids(codes), Working(PLAIN, b"", codes, 3).capture(0, 3, False, False))
    assert tree.walk(np.array([1, 256, 65536], np.uint32))[1] == 3
    assert tree.walk(np.array([1, 256, 65537], np.uint32))[1] == 2
    assert tree.walk(np.array([1, 0, 256], np.uint32))[1] == 1
    assert tree.walk(np.array([1, 9, 256, 9, 65536, 9], np.uint32)[::2])[1] == 3


def test_a_split_keeps_the_lower_object_and_its_children() -> None:
    tree = grown(PLAIN, "abcdef|gh")
    lower, _ = tree.walk(ids("abcdef"))
    lower.names.add("chat")
    lower.leases += 1
    upper = tree.split(lower, 2)
    assert (text_of(upper), text_of(lower)) == ("ab", "abcdef")
    assert lower.parent is upper and upper.children == {ord("c"): lower}
    assert (upper.names, upper.leases) == (set(), 0)
    assert text_of(tree.walk(ids("abcdefgh"))[0]) == "abcdefgh"


def test_a_tree_of_thousands_of_segments_needs_no_recursion() -> None:
    tree: Tree[Fake] = Tree()
    node = tree.root
    nothing = Fake(Kind(), 1, (), (), None)
    for _ in range(5000):
        node = tree.add(node, ids("a"), nothing)
    assert tree.walk(ids("a" * 6000))[1] == 5000
    assert len(node.path()) == 5000 == sum(1 for _ in tree)
    assert restorable_position(node, 5000, 4321) == 4321


def position(tree: Tree[Fake], text: str, limit: int = 1000) -> int:
    node, matched = tree.walk(ids(text))
    return restorable_position(node, matched, limit)


def test_plain_spans_restore_at_any_token() -> None:
    tree = grown(PLAIN, "abcd|efgh")
    assert [position(tree, "abcdefgh", limit) for limit in range(9)] == list(range(9))


def test_end_states_restore_at_their_ends_alone() -> None:
    tree = grown(Kind(span=True, stateful=True), "abcd|efgh")
    assert [position(tree, "abcdefgh", limit) for limit in range(9)] == [0, 0, 0, 0, 4, 4, 4, 4, 8]


def test_windows_restore_wherever_their_tokens_are_held() -> None:
    tree = grown(Kind(windows=(3,)), "abcdefgh|ij")
    # Of the first segment f, g, h are held: nothing before its end can be had.
    expected = {7: 0, 8: 8, 9: 9, 10: 10}
    assert {limit: position(tree, "abcdefghij", limit) for limit in expected} == expected


def test_a_half_that_lost_its_window_is_not_said_to_be_restorable() -> None:
    kind = Kind(windows=(4,))
    tree = grown(kind, "abcdefgh")
    node, _ = tree.walk(ids("abcdefgh"))
    tree.split(node, 6)  # holds e, f and lacks c, d
    upper, _ = tree.walk(ids("abcdef"))
    assert position(tree, "abcdef") == 0
    tree.split(upper, 5)  # the new lower half [5, 6) has all its own tokens, yet not c, d, e
    assert position(tree, "abcdef") == position(tree, "abcde") == 0
    assert position(tree, "abcdefgh") == 8


def test_a_window_that_reaches_back_still_serves_after_a_split() -> None:
    kind = Kind(windows=(4,))
    tree = grown(kind, "abcdef")
    parent, _ = tree.walk(ids("abcdef"))
    tree.split(parent, 5)
    fork, _ = tree.walk(ids("abcde"))
    codes = tuple(map(ord, "abcdexyz"))
    work = Working(kind, b"", codes, 8)
    tree.add(fork, ids("xyz"), work.capture(5, 8, False, True))
    assert position(tree, "abcdexyz") == 8
    lower, _ = tree.walk(ids("abcdexyz"))
    tree.split(lower, 6)
    assert position(tree, "abcdexyz") == 8
    assert position(tree, "abcdexy") == 7  # x and y are there, d and e above the fork


def test_a_hole_between_two_held_runs_is_seen() -> None:
    tree = grown(Kind(windows=(4,)), "a|bcdefg")
    node, _ = tree.walk(ids("abcdefg"))
    assert not holds_window(node, 0, 4, 4)  # d is held, b and c are not, a is
    assert holds_window(node, 3, 7, 4)
