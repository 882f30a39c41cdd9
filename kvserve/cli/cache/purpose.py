"""What a command needs of a store that is not, or not soundly, there."""

from __future__ import annotations

from enum import Enum, auto


class Purpose(Enum):
    """USE what is there; IMPORT into it, making it if need be; REPAIR its index, too."""

    USE = auto()
    IMPORT = auto()
    REPAIR = auto()
