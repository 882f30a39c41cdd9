"""Write the answers in guide and README anew, from a real server: `python -m tests.docs.record`.

Requests stay as they stand, and of an answer is shown what was shown before. Look at the difference
before you keep it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.docs.live import Played, play


def rewrite(page: Path, found: Iterable[Played]) -> int:
    """Put right what differs on a page; return how many blocks that were."""
    lines = page.read_text(encoding="utf-8").splitlines()
    wrong = sorted((one for one in found if one.differences), key=lambda one: -one.first_line)
    for one in wrong:
        lines[one.first_line : one.last_line] = one.right.splitlines()
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(wrong)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = play(Path(folder), with_shell=True).blocks
    for page in sorted({one.page for one in found}):
        changed = rewrite(page, (one for one in found if one.page == page))
        print(f"{page.name}: {changed} blocks written anew")


if __name__ == "__main__":
    main()
