"""A server that compares tokens whenever state is read from disk, and notes what it has found.

Run as `python -m tests.faults.watched NOTES serve FLAGS...`: the real command line, with a look in
between. Each line of the file NOTES is one JSON object; lines are appended whole, so what was
noted survives the process. Not a test module.

What a load is compared with is read anew, from the header of the file that the bytes came from:
its namespace and tokens must be those of the prompt that is restored by them, token for token, and
what memory adds must leave no hole.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from kvserve.cli.main import app
from kvserve.core.types import TokenIds
from kvserve.engine.engine import Engine
from kvserve.engine.fetch import Fetched, Fetcher
from kvserve.engine.working import WorkingCaches
from kvserve.store.disk import Disk
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.segments import StoredPath, StoredSegment
from kvserve.store.snapshot import read_header
from kvserve.store.snapshot_header import SnapshotHeader
from kvserve.store.store import Store


@dataclass(frozen=True, slots=True)
class Read:
    """The tokens `[start, start + len(token_ids))` of a namespace, as a file's header has them."""

    namespace: bytes
    start: int
    token_ids: TokenIds


class Watch:
    """Goes between the parts that a load passes through. Called on several threads."""

    def __init__(self, notes: str) -> None:
        self._notes = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._here = threading.local()
        self._reads: dict[int, tuple[Fetched, list[Read]]] = {}

    def note(self, **what: Any) -> None:
        os.write(self._notes, json.dumps(what).encode() + b"\n")

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.note(fault=what)

    # Each takes the original first and then its arguments.

    def submit(
        self, original: Callable[..., Any], engine: Engine, request: Any, stored: Any
    ) -> Any:
        if stored is not None:
            ours = np.array_equal(stored.token_ids, request.prompt.token_ids)
            self.expect(ours, "a path of other tokens came with a request")
            same = stored.namespace == request.namespace
            self.expect(same, "a path of another namespace came with a request")
        return original(engine, request, stored)

    def open(self, original: Callable[..., int], disk: Disk, path: Path) -> int:
        headers = getattr(self._here, "headers", None)
        if headers is None:
            return original(disk, path)
        self._here.headers = None  # what is opened to look at the header is no load
        try:
            header = _header(disk, path)
            fd = original(disk, path)
            # A file of one name never changes, but it may come and go.
            headers.append(header or _header(disk, path))
        finally:
            self._here.headers = headers
        return fd

    def read(
        self, original: Callable[..., Any], store: Store, segments: Sequence[StoredSegment]
    ) -> Any:
        self._here.headers = []
        try:
            packed = original(store, segments)
            headers = self._here.headers
        finally:
            self._here.headers = None
        runs = list(dict.fromkeys(segment.run_id for segment in segments))
        self.expect(len(headers) == len(runs) and None not in headers, "not one file for each run")
        of_run = dict(zip(runs, headers, strict=False))
        found = []
        for segment in segments:
            header = of_run[segment.run_id]
            own = header.token_ids[segment.start - header.start : segment.end - header.start]
            self.expect(len(own) == segment.end - segment.start, "a segment outside its file")
            found.append(Read(header.namespace or b"", segment.start, own))
        self._here.found = found
        return packed

    def fetch(
        self, original: Callable[..., Fetched], fetcher: Fetcher, path: StoredPath, *more: int
    ) -> Fetched:
        fetched = original(fetcher, path, *more)
        if fetched.segments:
            found: list[Read] = self._here.found
            self.expect(len(found) == len(fetched.segments), "other segments than were asked for")
            for read, packed in zip(found, fetched.segments, strict=False):
                self.expect(read.start == packed.spec.start, "segments in another order")
            self._compare(
                found, path.namespace, path.token_ids[: fetched.num_matched], "the path's"
            )
            self._reads[id(fetched)] = (fetched, found)
        return fetched

    def restore(
        self,
        original: Callable[..., Any],
        working: WorkingCaches,
        run: Any,
        lease: Any,
        fetched: Any,
    ) -> Any:
        namespace, token_ids = run.request.namespace, run.token_ids
        _, found = self._reads.pop(id(fetched))
        tree = working._cache._trees.get(namespace)
        self.expect(lease.tree is tree or not lease.num_tokens, "memory of another namespace")
        held = lease.node.token_ids()[: lease.num_tokens]
        same = np.array_equal(held, token_ids[: lease.num_tokens])
        self.expect(same, "memory held other tokens than the prompt's")
        matched = token_ids[: fetched.num_matched]
        self._compare(found, namespace, matched, "the prompt's")
        self.expect(found[0].start <= lease.num_tokens, "a hole before what was read")
        end = min(found[-1].start + len(found[-1].token_ids), len(matched))
        self.expect(end >= fetched.num_tokens, "fewer tokens were read than are restored")
        restored = original(working, run, lease, fetched)
        if restored is not None:
            self.note(load=fetched.num_tokens, segments=len(found), held=lease.num_tokens)
        return restored

    def _compare(
        self, found: list[Read], namespace: bytes, token_ids: TokenIds, whose: str
    ) -> None:
        """Compare what files say with the tokens of a prompt.

        Each counts up to where the next one begins: behind that a file may go on with another
        conversation's tokens.
        """
        ends = [*(read.start for read in found[1:]), len(token_ids)]
        for read, following in zip(found, ends, strict=True):
            self.expect(read.namespace == namespace, f"a namespace that is not {whose}")
            end = min(read.start + len(read.token_ids), following)
            last = following == len(token_ids)
            self.expect(end == following or last, f"a hole in what was read for {whose}")
            ours = token_ids[read.start : end]
            same = np.array_equal(read.token_ids[: end - read.start], ours)
            self.expect(same and len(ours) > 0, f"tokens that are not {whose}")


def main() -> None:
    """Run the command line under watch."""
    watch = Watch(sys.argv.pop(1))
    places: list[tuple[type, str, Callable[..., Any]]] = [
        (Engine, "submit", watch.submit),
        (Store, "read", watch.read),
        (Disk, "open", watch.open),
        (Fetcher, "fetch", watch.fetch),
        (WorkingCaches, "_restored_from_disk", watch.restore),
    ]
    with ExitStack() as stack:
        for owner, name, hook in places:
            stack.enter_context(patch.object(owner, name, _between(hook, getattr(owner, name))))
        app()


def _header(disk: Disk, path: Path) -> SnapshotHeader | None:
    try:
        return read_header(disk, path)
    except SnapshotDamaged:
        return None


def _between(hook: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def method(*arguments: Any) -> Any:
        return hook(original, *arguments)

    return method


if __name__ == "__main__":
    main()
