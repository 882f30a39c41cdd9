"""What `verify`, `repair` and `gc` have found and done, as lines. Stateless."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvserve.cli.cache import words
from kvserve.cli.cache.place import Checked, Mended, Problem


def checked_lines(found: Checked) -> Iterator[str]:
    """Yield a line for each fault, then one for the whole."""
    yield from _problem_lines(found.problems)
    looked_at = (
        words.count(found.conversations, "conversation"),
        words.count(found.files, "file"),
        words.size(found.bytes),
    )
    wrong = len(found.problems)
    outcome = f"{words.count(wrong, 'fault')}; see `kvserve cache repair`" if wrong else "all well"
    yield f"{', '.join(looked_at)}: {outcome}"


def mended_lines(mended: Mended) -> Iterator[str]:
    """Yield a line for each fault and what was done; those that remain come last."""
    yield from _problem_lines(mended.problems)
    did = [
        (mended.quarantined_files, "damaged file", "put into quarantine"),
        (mended.restored_rows, "row", "made again from files"),
        (mended.ended_conversations, "conversation", "whose time was over ended"),
    ]
    for number, noun, what in did:
        if number:
            yield f"{words.count(number, noun)} {what}"
    removed = words.count(mended.removed_files, "file")
    yield f"{removed} removed, {words.size(mended.freed_bytes)}"
    for detail in mended.left:
        yield f"not repaired: {detail}"


def _problem_lines(problems: Iterable[Problem]) -> Iterator[str]:
    return (f"{problem.subject}: {problem.detail}" for problem in problems)
