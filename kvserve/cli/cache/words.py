"""Figures and names in words, for tables and lines. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

_UNITS = ("B", "kB", "MB", "GB", "TB")
_SPANS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def size(nbytes: int) -> str:
    """Return 0 B, 999 B, 1.2 kB, 12 MB, 3.4 GB: powers of 1000, as the settings have them."""
    number, unit = float(nbytes), _UNITS[0]
    for larger in _UNITS[1:]:
        if number < 999.5:
            break
        number, unit = number / 1000, larger
    digits = 1 if unit != "B" and number < 9.95 else 0
    return f"{number:.{digits}f} {unit}"


def span(duration: timedelta) -> str:
    """Return the duration, rounded, in its largest unit: 45 s, 3 min, 7 h, 12 d."""
    seconds = max(0, round(duration.total_seconds()))
    for length, unit in _SPANS:
        if seconds >= length:
            return f"{round(seconds / length)} {unit}"
    return "0 s"


def count(number: int, noun: str) -> str:
    """Return 1 file, 1,234 files."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def printable(text: str) -> str:
    """Return `text` on one line and without the power to move a terminal's cursor."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def tenant(name: str) -> str:
    """Return a tenant as lists show it, long enough to be told from others and given back."""
    return name[:12] or "-"
