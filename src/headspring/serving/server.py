"""The process: uvicorn on one socket, and an end without a broken answer.

SIGTERM or Ctrl-C: new requests get 503 and /ready says so, what runs may finish for `drain_seconds`, the rest is cancelled and
told so, the process ends with code 0. A second signal ends it at once.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from types import FrameType

import uvicorn
from fastapi import FastAPI

from headspring.artifacts import UserError
from headspring.inference import LanguageModel
from headspring.inference.engine import EngineConfig
from headspring.serving.app import House, create_app
from headspring.serving.config import ServerConfig

LOGGER = logging.getLogger("headspring.serving")
BACKLOG = 512  # connections that wait to be accepted
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(models: Mapping[str, LanguageModel], config: ServerConfig | None = None, engine: EngineConfig | None = None) -> None:
    """Serve these models by name until a signal comes. Raises `UserError` where the address cannot be used."""
    server = Server.of(models, config or ServerConfig(), engine)
    print(f"serving {', '.join(models)} at {server.url}", flush=True)
    server.run()


def _settings(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=config.limits.header_bytes + 4096,
        backlog=BACKLOG,
    )


def _listen(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
        listening.listen(BACKLOG)  # who connects before the application is up is answered once it is
    except OSError as error:
        listening.close()
        raise UserError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror or error}); try another --port"
        ) from None
    return listening


class Server(uvicorn.Server):
    """uvicorn's on a socket of ours, which drains before it stops: after a signal, or after `house.draining` was set."""

    def __init__(self, settings: uvicorn.Config, house: House, listening: socket.socket):
        super().__init__(settings)
        self.house, self.listening = house, listening
        self._draining: asyncio.Future[None] | None = None

    @classmethod
    def of(cls, models: Mapping[str, LanguageModel], config: ServerConfig, engine: EngineConfig | None = None) -> "Server":
        """Raises `UserError` where the address cannot be used or would need a key."""
        app = create_app(models, config, engine)
        return cls(_settings(app, config), app.state.house, _listen(config))

    @property
    def url(self) -> str:
        host, port = self.listening.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run([self.listening] if sockets is None else sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal is not raised again at the end: a drained server has ended well."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread hears signals
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.house.draining:
            os._exit(1)  # asked twice: nothing is waited for
        self.house.draining = True
        LOGGER.warning("stopping: what runs may finish for %g s", self.house.config.drain_seconds)

    async def on_tick(self, counter: int) -> bool:
        if self.house.draining and self._draining is None:
            self._draining = asyncio.ensure_future(self.house.drain())
        if self._draining is not None and self._draining.done():
            self.should_exit = True
        return await super().on_tick(counter)
