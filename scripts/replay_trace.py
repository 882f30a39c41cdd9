"""Show the eviction policy on a trace, and on made-up loads, without a model.

Run as `python -m scripts.replay_trace`. Memory and disk of given sizes serve the trace twice, with
the server's own policy and with LRU, beside a cache without limit and the optimum with foresight
(`scripts.replay.optimum` says what that means). Hit ratios are shares of the blocks asked for, of
512 tokens each, partial last ones included. Then the loads of `scripts.replay.scenarios`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from scripts.replay.optimum import unlimited, with_foresight
from scripts.replay.requests import BLOCK_TOKENS, Request, read_trace
from scripts.replay.scenarios import SCENARIOS, Scenario
from scripts.replay.tiers import Hits, replay

ROOT = Path(__file__).resolve().parents[1]
TRACE = ROOT.parent / "shared" / "data" / "traces" / "mooncake_conversation.jsonl.gz"
SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Hit ratios at one pair of budgets, in blocks: of memory, and of the disk behind it.

    `optimum_ram` is the most that memory can find, `optimum` the most that both can.
    """

    name: str
    ram_blocks: int
    disk_blocks: int
    ram: float
    disk: float
    miss: float
    lru_ram: float
    lru_disk: float
    lru_miss: float
    optimum_ram: float
    optimum: float
    unlimited: float


def measure(
    name: str,
    requests: Sequence[Request],
    ram: int,
    disk: int,
    advance: Callable[[], None] = lambda: None,
) -> Row:
    """Replay the requests against one pair of budgets; `advance` is called after each, twice."""
    ours = replay(requests, ram, disk, advance=advance)
    lru = replay(requests, ram, disk, lru=True, advance=advance)
    total = max(ours.total, 1)
    best = with_foresight(requests, ram)
    return Row(
        name=name,
        ram_blocks=ram,
        disk_blocks=disk,
        **_shares(ours, ""),
        **_shares(lru, "lru_"),
        optimum_ram=best / total,
        optimum=(with_foresight(requests, ram + disk) if disk else best) / total,
        unlimited=unlimited(requests) / total,
    )


def _shares(hits: Hits, prefix: str) -> dict[str, float]:
    total = max(hits.total, 1)
    ram, disk = hits.ram / total, hits.disk / total
    return {f"{prefix}ram": ram, f"{prefix}disk": disk, f"{prefix}miss": 1 - ram - disk}


def table(title: str, rows: Sequence[Row], scale: int, unit: str) -> Table:
    """Return the rows for people; sizes are multiplied by `scale`."""
    shown = Table(title=title, caption=f"memory and disk in {unit}; ratios are shares of blocks")
    named, tiers = any(row.name for row in rows), any(row.disk_blocks for row in rows)
    found, best = ("\nRAM   disk  miss", "\nRAM   both") if tiers else ("", "")
    for head in ["load"] if named else []:
        shown.add_column(head)
    for head in ("memory", *(["disk"] if tiers else [])):
        shown.add_column(head, justify="right", no_wrap=True)
    for head in (f"kvserve{found}", f"LRU{found}", f"foresight{best}", "no\nlimit"):
        shown.add_column(head, no_wrap=True)
    for row in rows:
        sizes = [row.ram_blocks, *([row.disk_blocks] if tiers else [])]
        ours, lru = [row.ram], [row.lru_ram]
        if tiers:
            ours, lru = [row.ram, row.disk, row.miss], [row.lru_ram, row.lru_disk, row.lru_miss]
        optimum = [row.optimum_ram, *([row.optimum] if tiers else [])]
        shown.add_row(
            *([row.name] if named else []),
            *(_size(size * scale) for size in sizes),
            *(_ratios(group) for group in (ours, lru, optimum, [row.unlimited])),
        )
    return shown


def _size(number: int) -> str:
    return f"{number:,}" if number % 1000 or not number else f"{number // 1000:,}k"


def _ratios(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def amount(text: str) -> int:
    """Return a number with an optional suffix: `512`, `10k`, `2.5M`. Raises ValueError."""
    number, suffix = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    if suffix and suffix not in SUFFIXES:
        raise ValueError(f"{text!r} is no amount: use k, M or G")
    return round(float(number) * SUFFIXES.get(suffix, 1))


def amounts(text: str) -> list[int]:
    """Return the amounts in a list with commas. Raises ArgumentTypeError."""
    try:
        found = [amount(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if min(found) < 0:
        raise argparse.ArgumentTypeError("a budget cannot be negative")
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trace", type=Path, default=TRACE, help="JSON lines, gzipped or not")
    parser.add_argument("--ram", type=amounts, default="1k,5k,10k,20k,50k", help="budgets: 1k,20k")
    parser.add_argument("--disk", type=amounts, default="0,20k", help="0 for none")
    parser.add_argument("--unit", choices=("blocks", "tokens"), default="blocks")
    parser.add_argument("--only", choices=("trace", "scenarios"), help="leave the other out")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON instead")
    options = parser.parse_args(arguments)
    if options.only != "scenarios" and not options.trace.is_file():
        parser.error(
            f"there is no trace at {options.trace}; name a file with --trace, "
            "or leave the trace out with --only scenarios"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a trace that cannot be read ends it with status 1."""
    options = _options(arguments)
    scale = BLOCK_TOKENS if options.unit == "tokens" else 1
    requests: list[Request] = []
    if options.only != "scenarios":
        try:
            requests = read_trace(options.trace)
        except (OSError, ValueError) as error:
            raise SystemExit(f"The trace cannot be read: {error}") from error
    sizes = [(ram // scale, disk // scale) for disk in options.disk for ram in options.ram]
    jobs = [("", requests, ram, disk) for ram, disk in sizes] if requests else []
    scenarios: list[Scenario] = [] if options.only == "trace" else SCENARIOS
    jobs += [(scenario.name, scenario.make(), scenario.ram_blocks, 0) for scenario in scenarios]
    bar = TextColumn("replaying"), BarColumn(), TimeRemainingColumn()
    with Progress(*bar, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=2 * sum(len(job[1]) for job in jobs))
        rows = [measure(*job, advance=lambda: progress.advance(task)) for job in jobs]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    console = Console()
    for title, part in (
        (f"{options.trace.name}: {len(requests):,} requests", [r for r in rows if not r.name]),
        ("Made-up loads", [row for row in rows if row.name]),
    ):
        if part:
            console.print(table(title, part, scale, options.unit))


if __name__ == "__main__":
    main()
