"""The composition root: the one place where the parts are joined, started and stopped.

`serve` binds the port first, so that a port in use is said before a model is loaded, then loads
the model on the engine thread, then listens. It ends with 0 after a signal, 1 when the engine has
died, 2 when it could not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from kvserve import embedded
from kvserve.api.app import create_app
from kvserve.chat.archive import Archive, PersistMode
from kvserve.chat.conversations import ConversationBook
from kvserve.chat.directory import Directory
from kvserve.chat.keeper import Keeper
from kvserve.chat.operations import ConversationService
from kvserve.chat.template import Formatter
from kvserve.chat.turn import TurnService
from kvserve.config import Settings
from kvserve.core import blas
from kvserve.core.types import TokenIds
from kvserve.engine.engine import Engine, EngineSettings
from kvserve.engine.model import LoadedModel, ModelError, load, resolve
from kvserve.store.errors import StoreError, StoreLocked
from kvserve.store.lock import in_words, read_holder
from kvserve.store.store import Store
from kvserve.store.writer import Writer

log = logging.getLogger(__name__)

EXIT_OK, EXIT_ENGINE_DIED, EXIT_CANNOT_START = 0, 1, 2
EMBEDDED_NAME = "kvserve-embedded"
SHUTDOWN_GRACE_S = 5.0
UPKEEP_S = 60.0
SWEEP_EVERY = 60
"""Of so many rounds of upkeep one sweeps the data folder: once an hour, and at start."""


class StartError(Exception):
    """The server cannot start; the message is one line for the person who starts it."""


def serve(settings: Settings) -> int:
    """Run the server until a signal; return the exit code of the process."""
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for chatty in ("uvicorn", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        with bind(settings.host, settings.port) as listener:
            factory = uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()
            with asyncio.Runner(loop_factory=factory) as runner:
                return runner.run(_serve(settings, listener))
    except (StartError, ModelError, StoreError) as error:
        print(f"kvserve: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    except KeyboardInterrupt:
        return EXIT_OK


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket; port 0 takes a free one. Raises StartError in words."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StartError(f"--host {host}: {error.strerror or error}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        what = "is already in use" if "in use" in str(error) else f"cannot be used ({error})"
        raise StartError(f"port {port} on {host} {what}; choose another with --port") from error
    return listener


async def _serve(settings: Settings, listener: socket.socket) -> int:
    refuse_second(settings)
    died = asyncio.Event()
    engine = make_engine(settings, on_death=died.set)
    await engine.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(engine.stop)
        for note in engine.info.notes:
            log.warning("%s: %s", engine.info.name, note)
        log.info("matrix products on the CPU: %s", blas.describe())
        store = await open_store(settings, engine)
        if store is not None:
            stack.push_async_callback(store.aclose)
        parts = make_parts(settings, engine, store)
        await parts.archive.open()
        stack.push_async_callback(parts.archive.close)
        server = _Server(make_app(settings, engine, parts), settings, engine.info.name)
        if store is not None:
            server.on_ready = store.announce
            upkeep = asyncio.create_task(_upkeep(store, parts.archive))
            stack.push_async_callback(_end, upkeep)
        return await server.serve_until(listener, died)


def refuse_second(settings: Settings) -> None:
    """Raise StoreLocked if the data folder is in use, before a model is loaded for nothing.

    Opening the store is what decides; here whatever cannot be told is left to it.
    """
    if settings.persist != "off":
        with contextlib.suppress(OSError):
            holder = read_holder(settings.data_dir)
            if holder is not None:
                raise StoreLocked(in_words(holder))


async def open_store(settings: Settings, engine: Engine) -> Store | None:
    """Open what is on disk for the engine's model; None where nothing is to be kept there."""
    if settings.persist == "off" or not engine.info.caching:
        return None
    return await Store.open(
        settings.data_dir, identity=engine.info.identity, limits=settings.disk_limits()
    )


async def _upkeep(store: Store, archive: Archive) -> None:
    """Sweep the data folder now and then, and keep the disk's times of use up to date."""
    for turn in itertools.count():
        try:
            if turn % SWEEP_EVERY == 0:
                log.info("data folder swept: %s", await store.sweep())
            await asyncio.sleep(UPKEEP_S)
            await archive.tell_uses()
        except Exception:  # upkeep must not end the server
            log.exception("upkeep of the data folder failed")


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def make_engine(settings: Settings, on_death: Callable[[], None] | None = None) -> Engine:
    """Return an engine for the settings' model, not yet started. Raises ModelError."""
    limits = EngineSettings(
        budget_nbytes=settings.ram_budget,
        segment_tokens=settings.segment_tokens,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        prefill_slice_s=settings.prefill_slice_ms / 1000,
        caching=settings.caching,
        verify_share=settings.verify_cache,
    )
    return Engine(partial(_load, settings), limits, on_death)


def _load(settings: Settings) -> LoadedModel:
    folder = embedded.path() if settings.model is None else resolve(settings.model)
    name = settings.served_model_name or _name_of(settings.model, folder)
    log.info("loading %s", name)
    return load(
        folder,
        name=name,
        adapter=settings.adapter,
        max_context=settings.max_context,
        fingerprints=settings.data_dir / "fingerprints.json",
        trust_remote_code=settings.trust_remote_code,
    )


def _name_of(model: str | None, folder: Path) -> str:
    if model is None:
        return EMBEDDED_NAME
    return folder.resolve().name if Path(model).expanduser().is_dir() else model


@dataclass(frozen=True, slots=True)
class Parts:
    """What stands between HTTP and the engine."""

    turns: TurnService
    conversations: ConversationService
    archive: Archive


def make_parts(
    settings: Settings, engine: Engine, store: Store | None, formatter: Formatter | None = None
) -> Parts:
    """Join the chat parts over a started engine and an open store.

    `formatter` stands in for the model's own chat template.
    """
    book = ConversationBook()
    archive = Archive(
        mode=PersistMode.OFF if store is None else PersistMode(settings.persist),
        store=store,
        writer=None if store is None else Writer(),
        source=engine,
        cache=engine.cache,
        book=book,
        info=lambda: engine.info,
        clock=_now,
    )
    keeper = Keeper(book, engine.cache, archive, lambda: engine.info, _now)
    turns = TurnService(
        engine=engine,
        formatter=formatter or Formatter(engine.model.tokenizer),
        source=engine,
        book=book,
        archive=archive,
        keeper=keeper,
        auto_conversation=settings.auto_conversation,
    )
    conversations = ConversationService(
        engine=engine,
        book=book,
        archive=archive,
        keeper=keeper,
        directory=Directory(book, engine.cache, archive),
        turns=turns,
        clock=_now,
    )
    if store is not None:
        engine.attach_disk(store.read, _reporter(archive))
        engine.on_mismatch = _distruster(archive)
    return Parts(turns, conversations, archive)


def _reporter(archive: Archive) -> Callable[[int, str], None]:
    """Return a function for any thread that takes a damaged file out of use."""
    loop = asyncio.get_running_loop()

    def report(run_id: int, reason: str) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: found again next time
            asyncio.run_coroutine_threadsafe(archive.report(run_id, reason), loop)

    return report


def _distruster(archive: Archive) -> Callable[[bytes, TokenIds], None]:
    """Return a function for the event loop that takes a wrong path on disk out of use."""
    running: set[asyncio.Task[None]] = set()  # nobody else keeps them from being collected

    def distrust(namespace: bytes, token_ids: TokenIds) -> None:
        task = asyncio.ensure_future(archive.distrust(namespace, token_ids))
        running.add(task)
        task.add_done_callback(running.discard)

    return distrust


def _now() -> datetime:
    return datetime.now(UTC)


def make_app(settings: Settings, engine: Engine, parts: Parts) -> FastAPI:
    """Return the HTTP application over a started engine."""
    return create_app(
        turns=parts.turns,
        conversations=parts.conversations,
        engine=engine,
        keep_alive_s=settings.keep_alive_s,
        shutdown_grace_s=SHUTDOWN_GRACE_S,
        log_content=settings.log_content,
    )


class _Server(uvicorn.Server):
    """uvicorn on a socket of ours, which says when it is up and ends without raising signals."""

    def __init__(self, app: FastAPI, settings: Settings, model: str) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=round(SHUTDOWN_GRACE_S) + 1,
            )
        )
        self.on_ready: Callable[[str], None] | None = None
        self._host = settings.host
        self._model = model

    async def serve_until(self, listener: socket.socket, died: asyncio.Event) -> int:
        """Serve until a signal or until `died` is set; return the exit code."""

        async def watch() -> None:
            await died.wait()
            self.should_exit = True

        watcher = asyncio.create_task(watch())
        try:
            await self.serve(sockets=[listener])
        finally:
            watcher.cancel()
        return EXIT_ENGINE_DIED if died.is_set() else EXIT_OK

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if sockets and self.started:
            port = sockets[0].getsockname()[1]
            host = f"[{self._host}]" if ":" in self._host else self._host
            url = f"http://{host}:{port}"
            if self.on_ready is not None:
                self.on_ready(url)
            print(f"kvserve is ready at {url} (model {self._model})", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Turn signals into a clean end: uvicorn would raise them again, and exit with 143."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
