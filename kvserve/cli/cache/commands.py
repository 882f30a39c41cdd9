"""The commands of `kvserve cache`: parse, ask a place, print, exit.

Holds no state. Exit codes: 0, 1 for damage found or nothing of that name, 2 for bad usage and for
what is refused. What a command needs is imported inside it, so that `--help` answers at once.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvserve.cli.cache.asking import ask, console, failed, print_json, run
from kvserve.cli.cache.purpose import Purpose

if TYPE_CHECKING:
    from kvserve.cli.cache.place import Mended, Place, Progress

app = typer.Typer(
    no_args_is_help=True,
    help="Look into the store of conversations and keep it in order, with or without a server.",
)

DataDir = Annotated[
    str | None,
    typer.Option("--data-dir", metavar="DIR", help="Data folder; by default as for `serve`."),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="KVSERVE_API_KEY",
        help="Whose conversations; through a server, without it those of callers without a key.",
    ),
]
Tenant = Annotated[
    str | None,
    typer.Option(
        "--tenant",
        metavar="PREFIX",
        help="Whose conversations, as `ls` shows tenants ('-': without a key); no server running.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="The conversation.", show_default=False)]
_UNITS = {"": "seconds", "s": "seconds", "min": "minutes", "h": "hours", "d": "days"}


@app.command()
def ls(
    data_dir: DataDir = None, api_key: ApiKey = None, tenant: Tenant = None, as_json: AsJson = False
) -> None:
    """List the conversations, last used first."""
    from kvserve.cli.cache.listing import show_listing

    listing = ask(data_dir, api_key, tenant, lambda place, _: place.ls())
    if as_json:
        print_json({"items": [asdict(item) for item in listing.items], "bytes": listing.nbytes})
    else:
        show_listing(console(), listing, datetime.now(UTC))


@app.command()
def show(
    id: Id,
    all_branches: Annotated[
        bool, typer.Option("--all", help="Show all branches of a fork, however many.")
    ] = False,
    data_dir: DataDir = None,
    api_key: ApiKey = None,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Show a conversation: its tree of branches and its messages, with tokens and sizes."""
    from kvserve.cli.cache.detail import detail_json, show_detail

    detail = ask(data_dir, api_key, tenant, lambda place, _: place.show(id))
    if as_json:
        print_json(detail_json(detail))
    else:
        show_detail(console(), detail, datetime.now(UTC), all_branches=all_branches)


@app.command()
def verify(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Check every row and the digest of every file; change nothing. Exits with 1 for damage."""
    from kvserve.cli.cache.choice import verified
    from kvserve.cli.cache.outcome import checked_lines

    found = run(data_dir, verified, doing="verifying")
    if as_json:
        print_json(asdict(found))
    else:
        typer.echo("\n".join(checked_lines(found)))
    raise typer.Exit(1 if found.problems else 0)


@app.command()
def repair(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Take out of use what `verify` finds damaged; it is prefilled again when it is needed."""
    mended = ask(
        *(data_dir, None, None),
        lambda place, progress: place.repair(progress),
        doing="repairing",
        purpose=Purpose.REPAIR,
    )
    _print_mended(mended, as_json)
    raise typer.Exit(1 if mended.left else 0)


@app.command()
def gc(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Remove conversations whose time is over, and files that no conversation uses."""
    _print_mended(ask(data_dir, None, None, lambda place, _: place.gc()), as_json)


@app.command()
def pin(
    id: Id,
    ttl: Annotated[
        str | None,
        typer.Option("--ttl", metavar="TIME", help="For how long: 90s, 30min, 12h, 7d."),
    ] = None,
    data_dir: DataDir = None,
    api_key: ApiKey = None,
    tenant: Tenant = None,
) -> None:
    """Keep a conversation from being evicted, for good or for a time."""
    ttl_s = None if ttl is None else _seconds(ttl)
    until = ask(data_dir, api_key, tenant, lambda place, _: place.pin(id, ttl_s))
    typer.echo(f"pinned {id}" + (f" until {until:%Y-%m-%d %H:%M:%S} UTC" if until else ""))


@app.command()
def unpin(id: Id, data_dir: DataDir = None, api_key: ApiKey = None, tenant: Tenant = None) -> None:
    """Let a pinned conversation be evicted again."""
    ask(data_dir, api_key, tenant, lambda place, _: place.unpin(id))
    typer.echo(f"unpinned {id}")


@app.command()
def rm(id: Id, data_dir: DataDir = None, api_key: ApiKey = None, tenant: Tenant = None) -> None:
    """Delete a conversation, with the state that no other one uses."""
    ask(data_dir, api_key, tenant, lambda place, _: place.rm(id))
    typer.echo(f"deleted {id}")


@app.command()
def export(
    id: Id,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="File to write.", show_default=False)
    ],
    force: Annotated[bool, typer.Option("--force", help="Write over FILE.")] = False,
    data_dir: DataDir = None,
    api_key: ApiKey = None,
    tenant: Tenant = None,
) -> None:
    """Write a conversation into one file that another kvserve with the same model can take in."""
    from kvserve.cli.cache import words
    from kvserve.cli.cache.file import check_target

    async def work(place: Place, progress: Progress) -> int:
        check_target(file, force=force)
        return await place.export(id, file, progress)

    nbytes = ask(data_dir, api_key, tenant, work, doing="exporting")
    typer.echo(f"exported {id} to {file}, {words.size(nbytes)}")


@app.command("import")
def import_(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="File that `export` has written.", show_default=False),
    ],
    id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Its new id; by default its old one.")
    ] = None,
    data_dir: DataDir = None,
    api_key: ApiKey = None,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Verify an exported conversation and take it in."""
    from kvserve.cli.cache import words

    item = ask(
        *(data_dir, api_key, tenant),
        lambda place, progress: place.import_(file, id, progress),
        doing="importing",
        purpose=Purpose.IMPORT,
    )
    if as_json:
        print_json(asdict(item))
    else:
        tokens, messages = words.count(item.tokens, "token"), words.count(item.messages, "message")
        typer.echo(f"imported {item.id}: {tokens} in {messages}, {words.size(item.bytes)}")


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,6})\s*(s|min|h|d|)", text.strip(), re.ASCII)
    if match is None or int(match[1]) == 0:
        raise failed(f"--ttl: should be a time such as 90s, 30min, 12h or 7d, got {text!r}", 2)
    return timedelta(**{_UNITS[match[2]]: int(match[1])}).total_seconds()


def _print_mended(mended: Mended, as_json: bool) -> None:
    from kvserve.cli.cache.outcome import mended_lines

    if as_json:
        print_json(asdict(mended))
    else:
        typer.echo("\n".join(mended_lines(mended)))
