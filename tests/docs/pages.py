"""Reading the project's Markdown: fenced blocks, tables, sections. Pure; not a test module."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DECISIONS = ROOT / "docs" / "decisions.md"
GUIDE = ROOT / "docs" / "kv-cache-dev-guide.md"
README = ROOT / "README.md"

_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands behind its fence, its text, and where the text's lines lie."""

    language: str
    text: str
    first_line: int

    @property
    def last_line(self) -> int:
        """The line behind the text: the closing fence."""
        return self.first_line + len(self.text.splitlines())


@dataclass(frozen=True)
class Page:
    """A page of Markdown; lines are counted from 0."""

    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def section(self, heading: str) -> Page:
        """Return what stands below a heading, up to the next of its rank or a higher one."""
        lines = self.text.splitlines()
        start = lines.index(heading)
        rank = heading.partition(" ")[0]
        fenced = False
        for number, line in enumerate(lines[start + 1 :], start + 1):
            fenced ^= line.startswith("```")
            mark = line.partition(" ")[0]
            if not fenced and set(mark) == {"#"} and len(mark) <= len(rank):
                return Page("\n".join(lines[start:number]))
        return Page("\n".join(lines[start:]))

    @property
    def blocks(self) -> list[Block]:
        """All fenced blocks in order."""
        found: list[Block] = []
        opened: tuple[str, int] | None = None
        lines = self.text.splitlines()
        for number, line in enumerate(lines):
            if not line.startswith("```"):
                continue
            if opened is None:
                opened = (line[3:].strip(), number + 1)
                continue
            language, first = opened
            found.append(Block(language, "\n".join(lines[first:number]), first))
            opened = None
        assert opened is None, f"line {opened}: a fence that is not closed"
        return found

    @property
    def prose(self) -> str:
        """The text without its fenced blocks."""
        lines = self.text.splitlines()
        for block in reversed(self.blocks):
            del lines[block.first_line - 1 : block.last_line + 1]
        return "\n".join(lines)

    def table(self, *head: str) -> list[list[str]]:
        """Return the rows of the one table with these column names, cells stripped."""
        wanted = list(head)
        rows: list[list[str]] | None = None
        found: list[list[str]] | None = None
        for line in self.text.splitlines():
            cells = (
                [cell.strip() for cell in line.strip("|").split("|")]
                if line.startswith("|")
                else None
            )
            if rows is not None and cells is None:
                rows = None
            elif rows is not None and cells is not None and set(cells[0]) != {"-"}:
                assert len(cells) == len(wanted), line
                rows.append(cells)
            elif cells == wanted:
                assert found is None, f"two tables of {wanted}"
                rows = found = []
        assert found, f"no table of {wanted}"
        return found


def code_in(text: str) -> list[str]:
    """Return what stands between backticks, in order."""
    return _CODE.findall(text)


GUIDE_PAGE = Page.read(GUIDE)
