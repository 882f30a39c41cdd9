"""The pages' transcripts, played on a real server of the embedded model. Not a test module.

One server at a time: it is started where the guide starts one, and again, on the same data folder,
where the guide does so again. The README's section on lasting conversations is played beside it, by
a real shell with curl, as another caller.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tests.docs.pages import GUIDE, README, Block, Page
from tests.docs.transcripts import answered, differences, parse, send
from tests.server.conftest import ServerProcess, start_server

README_URL = "http://127.0.0.1:8000"
TOUR = "## A tour in 60 seconds"
LASTING = "## Conversations that last"
_SERVE = "$ kvserve serve"
_RESTART = "scripts/serve"
_END = "--- end of block ---"


@dataclass(frozen=True)
class Played:
    """What came of one block: how it differs from what the page shows, and what it ought to be."""

    page: Path
    first_line: int
    last_line: int
    differences: list[str]
    right: str


def guide_phases() -> list[tuple[list[str], list[Block]]]:
    """Return, for each start of the server in the guide, its flags and the exchanges behind it."""
    phases: list[tuple[list[str], list[Block]]] = []
    for block in Page.read(GUIDE).blocks:
        if block.language == "console" and block.text.startswith(_SERVE):
            command = block.text.splitlines()[0].removeprefix(_SERVE)
            phases.append((shlex.split(command, comments=True), []))
        elif block.language == "http":
            phases[-1][1].append(block)
    return phases


def readme_phases() -> list[list[tuple[Block, Block | None]]]:
    """Return the README's shell blocks, each with the block of its output, by start of a server."""
    page = Page.read(README)
    offset = page.text.splitlines().index(LASTING)
    tour = [block for block in page.section(TOUR).blocks if block.language == "sh"]
    phases: list[list[tuple[Block, Block | None]]] = [[(block, None) for block in tour]]
    blocks = [
        Block(block.language, block.text, block.first_line + offset)
        for block in page.section(LASTING).blocks
    ]
    for number, block in enumerate(blocks):
        if block.language == "sh" and block.text.startswith(_RESTART):
            phases.append([])
        elif block.language == "sh":
            after = blocks[number + 1] if number + 1 < len(blocks) else None
            shows = after is not None and not after.language
            phases[-1].append((block, after if shows else None))
    return phases


@dataclass(frozen=True)
class Play:
    """All that came of playing: the blocks, the last server's figures, each one's ready line."""

    blocks: list[Played]
    stats: dict[str, Any]
    ready: list[str]
    data: Path


class Shell:
    """A bash that keeps its functions and variables from one block to the next."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            ["bash"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, text: str) -> str:
        """Return what the commands print."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{text}\necho\necho '{_END}'\n")
        self._process.stdin.flush()
        lines: list[str] = []
        for line in self._process.stdout:
            if line.rstrip() == _END:
                break
            lines.append(line.rstrip())
        while lines and not lines[-1]:
            lines.pop()
        return "\n".join(lines)

    def close(self) -> None:
        self._process.communicate(timeout=30)


@contextmanager
def _serving(data: Path, flags: list[str], port: str) -> Iterator[ServerProcess]:
    server = start_server(data, "--port", port, *flags)
    try:
        server.wait_ready()
        yield server
    finally:
        code = server.end()
    assert code == 0 and "Traceback" not in server.log, server.log


def play(folder: Path, *, with_shell: bool) -> Play:
    """Play all transcripts on servers whose data folder is made in `folder`."""
    data, files = folder / "data", folder / "files"
    files.mkdir()
    found: list[Played] = []
    stats: dict[str, Any] = {}
    ready: list[str] = []
    port = "0"
    shell = Shell(files)
    try:
        for phase, parts in zip_longest(guide_phases(), readme_phases()):
            assert phase is not None, "the README starts the server more often than the guide"
            flags, blocks = phase
            with _serving(data, flags, port) as server:
                ready += [line.rstrip() for line in server.lines if line.startswith("kvserve is")]
                port = server.url.rpartition(":")[2]  # the shell's functions know it by now
                if with_shell:
                    found += [
                        done for part in parts or () if (done := _shell(shell, server, *part))
                    ]
                found += [_exchange(block, server, files) for block in blocks]
                stats = server.get("/stats")
    finally:
        shell.close()
    return Play(found, stats, ready, data)


def _exchange(block: Block, server: ServerProcess, files: Path) -> Played:
    exchange = parse(block.text)
    answer = send(exchange, server.url, files)
    return Played(
        GUIDE,
        block.first_line,
        block.last_line,
        differences(exchange, answer),
        answered(exchange, answer),
    )


def _shell(shell: Shell, server: ServerProcess, block: Block, shown: Block | None) -> Played | None:
    printed = shell.run(block.text.replace(README_URL, server.url))
    if shown is None:
        return None
    same = _stable(printed) == _stable(shown.text)
    wrong = [] if same else [f"it prints:\n{printed}\ninstead of:\n{shown.text}"]
    return Played(README, shown.first_line, shown.last_line, wrong, printed)


def _stable(text: str) -> str:
    text = re.sub(r'("bytes": ?)\d+', r"\1N", text)
    text = re.sub(r"chatcmpl-[0-9a-f]+|fp_[0-9a-f]+|conv_[0-9a-f]{24}", "random", text)
    text = re.sub(r'("(?:created|tokens_per_second)": ?)[\d.]+', r"\1N", text)
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:]+Z", "a time", text)
