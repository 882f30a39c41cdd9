"""The composition root: the one place where the parts are joined, started and stopped.

`serve` binds the port first, so that a port in use is said before a model is loaded, then loads
the model on the engine thread, then listens. It ends with 0 after a signal, 1 when the engine has
died, 2 when it could not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from kvserve import embedded
from kvserve.api.app import create_app
from kvserve.chat.conversations import ConversationBook
from kvserve.chat.template import Formatter
from kvserve.chat.turn import TurnService
from kvserve.config import Settings
from kvserve.core import blas
from kvserve.engine.engine import Engine, EngineSettings
from kvserve.engine.model import LoadedModel, ModelError, load, resolve

log = logging.getLogger(__name__)

EXIT_OK, EXIT_ENGINE_DIED, EXIT_CANNOT_START = 0, 1, 2
EMBEDDED_NAME = "kvserve-embedded"
SHUTDOWN_GRACE_S = 5.0


class StartError(Exception):
    """The server cannot start; the message is one line for the person who starts it."""


def serve(settings: Settings) -> int:
    """Run the server until a signal; return the exit code of the process."""
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        with bind(settings.host, settings.port) as listener:
            factory = uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()
            with asyncio.Runner(loop_factory=factory) as runner:
                return runner.run(_serve(settings, listener))
    except (StartError, ModelError) as error:
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
    died = asyncio.Event()
    engine = make_engine(settings, on_death=died.set)
    await engine.start()
    try:
        for note in engine.info.notes:
            log.warning("%s: %s", engine.info.name, note)
        log.info("matrix products on the CPU: %s", blas.describe())
        server = _Server(make_app(settings, engine), settings, engine.info.name)
        return await server.serve_until(listener, died)
    finally:
        await engine.stop()


def make_engine(settings: Settings, on_death: Callable[[], None] | None = None) -> Engine:
    """Return an engine for the settings' model, not yet started. Raises ModelError."""
    limits = EngineSettings(
        budget_nbytes=settings.ram_budget,
        segment_tokens=settings.segment_tokens,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        prefill_slice_s=settings.prefill_slice_ms / 1000,
        caching=settings.caching,
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


def make_app(settings: Settings, engine: Engine) -> FastAPI:
    """Return the HTTP application over a started engine."""
    turns = TurnService(
        engine=engine,
        formatter=Formatter(engine.model.tokenizer),
        cache=engine.cache,
        book=ConversationBook(),
        auto_conversation=settings.auto_conversation,
    )
    return create_app(
        turns=turns,
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
            print(f"kvserve is ready at http://{host}:{port} (model {self._model})", flush=True)

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
