"""A disk that remembers what was done to it, and every state that a loss of power may leave.

What the system promises: bytes written before an fsync of their file are there, names made,
changed or removed before an fsync of their folder are so. All else may be there, or not, or in
part. A rename happens at once or not at all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvserve.store.disk import Disk

DATA_FATES = ("kept", "dropped", "zeros", "torn", "reordered")
"""Of writes without an fsync: all there; none; room but no bytes; the last one in half; the first
one missing."""


@dataclass(frozen=True, slots=True)
class Operation:
    """Something done to the disk.

    `kind` is one of create, write, fsync, rename, unlink, make_folder, fsync_folder, outside (a
    file that another library wrote durably, an index say) and note. `file` numbers a file, however
    it is named.
    """

    kind: str
    path: Path = Path()
    target: Path = Path()
    file: int = 0
    offset: int = 0
    data: bytes = b""

    @property
    def folder(self) -> Path:
        """The folder whose fsync makes this durable."""
        return (self.target if self.kind == "rename" else self.path).parent


@dataclass(slots=True)
class CrashState:
    """A folder as a loss of power may leave it; paths are relative to the recorded root."""

    name: str
    num_operations: int
    notes: tuple[str, ...]
    folders: set[Path] = field(default_factory=set)
    files: dict[Path, bytes] = field(default_factory=dict)

    def materialise(self, root: Path) -> None:
        """Build it in an empty folder."""
        for folder in sorted(self.folders):
            (root / folder).mkdir(parents=True, mode=0o700)
        for path, data in self.files.items():
            (root / path).write_bytes(data)


class RecordingDisk(Disk):
    """Works like `Disk` below `root` and records; what is there at the start counts as durable."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.operations: list[Operation] = []
        self._lock = threading.Lock()
        self._files: dict[int, int] = {}  # by descriptor
        self._base_folders = {p.relative_to(root) for p in root.rglob("*") if p.is_dir()}
        base = [p for p in sorted(root.rglob("*")) if p.is_file()]
        self._base = {p.relative_to(root): p.read_bytes() for p in base}
        self._names = {path: file for file, path in enumerate(self._base)}  # as the program sees it
        self._num_files = len(self._base)

    # -- what the program does ----------------------------------------------------------------

    def create(self, path: Path) -> int:
        fd = super().create(path)
        with self._lock:
            file, self._num_files = self._num_files, self._num_files + 1
            self._files[fd] = file
            self._names[path.relative_to(self.root)] = file
        self._record("create", path, file=file)
        return fd

    def write_some(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        taken = super().write_some(fd, buffers, offset)
        data = b"".join(buffers)[:taken]
        self._record("write", file=self._files[fd], offset=offset, data=data)
        return taken

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self._record("fsync", file=self._files[fd])

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        with self._lock:
            file = self._names.pop(source.relative_to(self.root))
            self._names[target.relative_to(self.root)] = file
        self._record("rename", source, target, file=file)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._names.pop(path.relative_to(self.root), None)
        self._record("unlink", path)

    def make_folder(self, folder: Path) -> None:
        known = folder.is_dir()
        super().make_folder(folder)
        if not known:
            self._record("make_folder", folder)

    def fsync_folder(self, folder: Path) -> None:
        super().fsync_folder(folder)
        # By any name below the folder: what is synced are the folder's entries.
        self._record("fsync_folder", folder / "any")

    # -- what a test adds ---------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Remember that something was acknowledged here; states after it list it."""
        self._record("note", self.root / text)

    def outside(self, path: Path, data: bytes | None = None) -> None:
        """Remember that a file outside the store's hands is durable as it is now."""
        self._record("outside", path, data=path.read_bytes() if data is None else data)

    def _record(
        self,
        kind: str,
        path: Path | None = None,
        target: Path | None = None,
        file: int = 0,
        offset: int = 0,
        data: bytes = b"",
    ) -> None:
        short = Path() if path is None else path.relative_to(self.root)
        other = Path() if target is None else target.relative_to(self.root)
        self.operations.append(Operation(kind, short, other, file, offset, data))

    # -- what may be left ---------------------------------------------------------------------

    def crash_states(self, first: int = 0) -> Iterator[CrashState]:
        """Yield every different state after each number of operations from `first` on."""
        seen: set[int] = set()
        for count in range(first, len(self.operations) + 1):
            done = self.operations[:count]
            for fate in DATA_FATES:
                contents = self._contents(done, fate)
                for dropped in _fates_of_names(done):
                    state = self._state(done, fate, dropped, contents)
                    key = hash(
                        (state.notes, frozenset(state.folders), frozenset(state.files.items()))
                    )
                    if key not in seen:
                        seen.add(key)
                        yield state

    def _contents(self, done: Sequence[Operation], fate: str) -> dict[int, bytes]:
        contents = {file: bytearray(data) for file, data in enumerate(self._base.values())}
        waiting: dict[int, list[Operation]] = {}
        for operation in done:
            if operation.kind == "create":
                contents[operation.file] = bytearray()
            elif operation.kind == "write":
                waiting.setdefault(operation.file, []).append(operation)
            elif operation.kind == "fsync":
                for write in waiting.pop(operation.file, []):
                    _apply(contents[write.file], write.offset, write.data)
        for file, writes in waiting.items():
            for number, write in enumerate(writes):
                data = write.data
                if fate == "dropped" or (fate == "reordered" and number == 0 and len(writes) > 1):
                    continue
                if fate == "zeros":
                    data = bytes(len(data))
                elif fate == "torn" and number == len(writes) - 1:
                    data = data[: len(data) // 2]
                _apply(contents[file], write.offset, data)
        return {file: bytes(data) for file, data in contents.items()}

    def _state(
        self,
        done: Sequence[Operation],
        fate: str,
        dropped: frozenset[int],
        contents: dict[int, bytes],
    ) -> CrashState:
        names = {path: file for file, path in enumerate(self._base)}
        folders = set(self._base_folders)
        notes: list[str] = []
        outside: dict[Path, bytes] = {}
        for number, operation in enumerate(done):
            if operation.kind == "note":
                notes.append(str(operation.path))
            elif operation.kind == "outside":
                outside[operation.path] = operation.data
            elif number in dropped:
                continue
            elif operation.kind == "create":
                names[operation.path] = operation.file
            elif operation.kind == "rename":
                names.pop(operation.path, None)
                names[operation.target] = operation.file
            elif operation.kind == "unlink":
                names.pop(operation.path, None)
            elif operation.kind == "make_folder":
                folders.add(operation.path)
        # What lies below a folder whose name was lost is lost with it.
        folders = {path for path in folders if folders.issuperset(path.parents[:-1])}
        reachable = folders | {Path()}
        files = {path: contents[file] for path, file in names.items() if path.parent in reachable}
        title = f"after {len(done)}: writes {fate}, names without {sorted(dropped)}"
        return CrashState(title, len(done), tuple(notes), folders, files | outside)


def _fates_of_names(done: Sequence[Operation]) -> Iterator[frozenset[int]]:
    """Yield which changes of names are lost: none, all, each alone, all but one."""
    loose: list[int] = []
    for number, operation in enumerate(done):
        if operation.kind in ("create", "rename", "unlink", "make_folder"):
            loose.append(number)
        elif operation.kind == "fsync_folder":
            loose = [n for n in loose if done[n].folder != operation.folder]
    yield frozenset()
    if loose:
        yield frozenset(loose)
        for number in loose:
            yield frozenset({number})
            yield frozenset(loose) - {number}


def _apply(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data
