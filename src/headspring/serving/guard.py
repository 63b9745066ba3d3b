"""The one door: a plain ASGI layer around everything, HTTP routes and WebSockets alike.

    headers small? → Host ours? → Origin ours? → key right? → body small, whole in time, not too deep? → the application

Why a layer and not a dependency of each route: a route that somebody adds later, a mounted application, the pages of the
documentation and unknown paths are all behind it, without anyone thinking of it. `tests/serving/test_security.py` lists every
route and asks each without a key. Only `/health` is open, so that a supervisor can see that the process lives.

- Keys are compared as SHA-256 digests with `hmac.compare_digest`, all of them each time: the time tells nothing.
- A web page on another site can make a browser send requests here (DNS rebinding): it comes under that site's name, so a
  `Host` that is neither an address nor one of our names is refused, and so is a foreign `Origin`. No CORS header is ever sent.
- The body is read here, before anything parses it: its bytes, its time and its depth are bounded, then it is handed on whole.

What it gives up: a body is held in memory (bounded by `body_bytes` × `max_open`), and cannot be streamed in.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headspring.serving.config import Limits, ServerConfig
from headspring.serving.errors import ApiError
from headspring.serving.metrics import Metrics

OPEN_PATHS = frozenset({"/health"})
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # possessive, and the end may be missing: linear on any input
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
KEY = "headspring_key"  # of the scope: which key opened the door, "" where none is needed


class Guard:
    """`app` behind the door."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics):
        self.app, self.config, self.metrics = app, config, metrics
        self.digests = [_digest(key) for key in config.keys]
        self.hosts = {name.lower() for name in (*config.allowed_hosts, "localhost", socket.gethostname())}
        self.open = 0  # requests inside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        counted = False
        try:
            self._admit(scope)
            if scope["type"] == "http":
                if self.open >= self.config.max_open:
                    raise ApiError(429, "too many requests are under way; try again soon", "too_many_open", retry_after=1)
                self.open, counted = self.open + 1, True
                receive = _replayed(await self._body(scope, receive), receive)
        except ApiError as error:
            self.metrics.reject(error.reason)
            self.open -= counted
            return await _turn_away(error, scope, receive, send)
        try:
            await self.app(scope, receive, send)
        finally:
            self.open -= counted

    def _admit(self, scope: Scope) -> None:
        """Raises `ApiError`; leaves the name of the key in the scope."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self.config.limits.header_bytes:
            raise ApiError(431, f"the headers are larger than {self.config.limits.header_bytes} bytes", "header_bytes")
        headers = _single(scope["headers"])
        host = headers.get("host", "")
        if not _known_host(host, self.hosts):
            raise ApiError(403, f"this server is not {host[:80]!r}; start it with --allow-host to use that name", "host")
        origin = headers.get("origin")
        if origin is not None and not self._same(origin, host):
            raise ApiError(403, f"pages of {origin[:80]!r} may not use this server", "origin")
        scope[KEY] = "" if scope["path"] in OPEN_PATHS and scope["type"] == "http" else self._key(headers)

    def _same(self, origin: str, host: str) -> bool:
        return origin in self.config.allowed_origins or urlsplit(origin).netloc.lower() == host.lower()

    def _key(self, headers: Mapping[str, str]) -> str:
        """The start of the digest of the key that was given: a name for it that is no secret."""
        if not self.digests:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        found = ""
        digest = _digest(given.strip())
        for known in self.digests:  # all of them: the time must not say which
            if hmac.compare_digest(known, digest):
                found = known.hex()[:16]
        if not found or scheme.lower() != "bearer":
            message = "a key is needed: send the header `Authorization: Bearer KEY`"
            raise ApiError(401, message, "unauthorized", headers={"WWW-Authenticate": "Bearer"})
        return found

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limits = self.config.limits
        length = _single(scope["headers"]).get("content-length", "0")
        if length.isdigit() and int(length) > limits.body_bytes:
            raise _too_large(limits)
        try:
            body = await asyncio.wait_for(_read(receive, limits), limits.body_seconds)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {limits.body_seconds:g} s", "body_seconds") from None
        check_depth(body, limits)
        return body


def check_depth(body: bytes, limits: Limits) -> None:
    """Raise `ApiError` for JSON that is nested too deep or has too many parts, in linear time and before it is parsed."""
    brackets = STRING.sub(b"", body).translate(None, NOT_BRACKETS)
    if len(brackets) > 2 * limits.json_brackets:
        raise ApiError(400, f"the body has more than {limits.json_brackets} arrays and objects", "json_brackets")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > limits.json_depth:
            raise ApiError(400, f"the body is nested deeper than {limits.json_depth}", "json_depth")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _single(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers by name. One that decides about access and comes twice is a trick: `ApiError`."""
    found: dict[str, str] = {}
    for raw, value in headers:
        name = raw.decode("latin-1").lower()
        if name in found and name in ("host", "origin", "authorization", "content-length"):
            raise ApiError(400, f"the header {name} comes twice", "headers")
        found[name] = value.decode("latin-1")
    return found


def _known_host(host: str, names: set[str]) -> bool:
    """An address, or one of our names. An address cannot be rebound: that attack needs a name."""
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return name.lower() in names
    return True


async def _read(receive: Receive, limits: Limits) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client left before its body had come", "disconnected")
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > limits.body_bytes:
            raise _too_large(limits)
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` as if the body came in one piece; afterwards the connection's own, which tells of a disconnect."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"the body is larger than {limits.body_bytes} bytes", "body_bytes", headers={"Connection": "close"})


async def _turn_away(error: ApiError, scope: Scope, receive: Receive, send: Send) -> Any:
    if scope["type"] == "websocket":
        await receive()  # the connect
        return await send({"type": "websocket.close", "code": 1008, "reason": error.reason})
    return await error.response()(scope, receive, send)
