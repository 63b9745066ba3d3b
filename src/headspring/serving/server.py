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
from collections.abc import Iterator, Mapping
from types import FrameType

import uvicorn

from headspring.artifacts import UserError
from headspring.inference import LanguageModel
from headspring.inference.engine import EngineConfig
from headspring.serving.app import House, create_app
from headspring.serving.config import ServerConfig

LOGGER = logging.getLogger("headspring.serving")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(models: Mapping[str, LanguageModel], config: ServerConfig | None = None, engine: EngineConfig | None = None) -> None:
    """Serve these models by name until a signal comes. Raises `UserError` where the address cannot be used."""
    config = config or ServerConfig()
    app = create_app(models, config, engine)
    listening = _listen(config)
    host, port = listening.getsockname()[:2]
    print(f"serving {', '.join(models)} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    settings = uvicorn.Config(
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
        backlog=512,
    )
    Server(settings, app.state.house).run(sockets=[listening])


def _listen(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
    except OSError as error:
        listening.close()
        raise UserError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror or error}); try another --port"
        ) from None
    return listening


class Server(uvicorn.Server):
    """uvicorn's, which drains before it stops."""

    def __init__(self, settings: uvicorn.Config, house: House):
        super().__init__(settings)
        self.house = house
        self._draining: asyncio.Future[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """As uvicorn's, but a signal is not raised again at the end: a drained server has ended well."""
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
