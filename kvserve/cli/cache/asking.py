"""How a command of `kvserve cache` gets its answer: settings, place, progress bar, errors.

Holds no state. Whatever goes wrong for a known reason is one line on standard error, and an exit
code; nobody is shown a traceback for a typing error or a full disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from kvserve import config
from kvserve.cli.cache.purpose import Purpose

if TYPE_CHECKING:
    from rich.console import Console

    from kvserve.cli.cache.place import Place, Progress

T = TypeVar("T")
Work = Callable[["Place", "Progress"], Awaitable[T]]


def ask(
    data_dir: str | None,
    api_key: str | None,
    tenant: str | None,
    work: Work[T],
    *,
    doing: str | None = None,
    purpose: Purpose = Purpose.USE,
) -> T:
    """Return what `work` makes of the place where the store can be asked; see `run`."""
    from kvserve.cli.cache.choice import opened

    async def at_place(settings: config.Settings, progress: Progress) -> T:
        async with opened(settings, purpose, api_key=api_key, tenant=tenant) as place:
            return await work(place, progress)

    return run(data_dir, at_place, doing=doing)


def run(
    data_dir: str | None,
    work: Callable[[config.Settings, Progress], Coroutine[Any, Any, T]],
    *,
    doing: str | None,
) -> T:
    """Return the result of `work`; print one line and exit if it cannot be had.

    With `doing` a bar on the terminal shows how far it is.
    """
    from kvserve.cli.cache.place import CacheError
    from kvserve.cli.cache.progress import bar

    # What the store logs stands in what it returns, too.
    logging.getLogger("kvserve").addHandler(logging.NullHandler())
    try:
        settings = config.load({} if data_dir is None else {"data_dir": data_dir})
        with bar(console(stderr=True), doing) as progress:
            return asyncio.run(work(settings, progress))
    except config.ConfigError as error:
        raise failed(str(error), 2) from None
    except CacheError as error:
        raise failed(str(error), error.exit_code) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise failed(f"{where}{error.strerror or error}", 2) from None


def failed(message: str, code: int) -> typer.Exit:
    typer.echo(f"kvserve: {message}", err=True)
    return typer.Exit(code)


def print_json(values: dict[str, Any]) -> None:
    import orjson

    options = orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z | orjson.OPT_OMIT_MICROSECONDS
    typer.echo(orjson.dumps(values, option=options).decode())


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)
