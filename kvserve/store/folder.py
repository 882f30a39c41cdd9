"""Where things lie in the data folder. Names only: nothing is read or written here.

lock                held by the process that has the store
index.sqlite3       which runs and conversations there are
snapshots/ab/       the runs' files, by the first two digits of their names
snapshots/tmp/      drafts; emptied at start
quarantine/         files that were found bad, kept for whoever wants to know why
imports/            uploads that are being received; emptied at start
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_SHELF = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{32}-[0-9]{1,13}\.safetensors")


@dataclass(frozen=True, slots=True)
class DataFolder:
    """The parts of one data folder."""

    path: Path

    @property
    def index(self) -> Path:
        return self.path / "index.sqlite3"

    @property
    def suspicion(self) -> Path:
        return self.path / "index.damaged"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def drafts(self) -> Path:
        return self.snapshots / "tmp"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    @property
    def imports(self) -> Path:
        return self.path / "imports"

    def of(self, file: str) -> Path:
        """Return where a run's file lies."""
        return self.snapshots / file[:2] / file

    def folders(self) -> list[Path]:
        """Return what has to be there before anything is written, parents first."""
        return [self.path, self.snapshots, self.drafts, self.quarantine, self.imports]


def is_shelf_name(name: str) -> bool:
    """Whether a folder of this name may hold runs' files."""
    return _SHELF.fullmatch(name) is not None


def is_file_name(name: str) -> bool:
    """Whether a name is one that the store gives to runs' files."""
    return _FILE.fullmatch(name) is not None
