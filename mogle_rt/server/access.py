"""Who may ask: loopback alone without a key, the right key otherwise; and what goes with every answer."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time
import traceback
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mogle_rt.errors import ConfigError
from mogle_rt.server.metrics import Metrics
from mogle_rt.server.refusals import Refusal

logger = logging.getLogger("mogle_rt.server")

SHORTEST_KEY = 16  # characters
OPEN = frozenset({"/", "/page.js", "/style.css", "/icon.svg", "/health"})  # hold nothing worth a key
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_keys(path: Path) -> list[bytes]:
    """The keys of a file, one a line; empty lines and lines that begin with # are left out.

    Raises:
        ConfigError: the file can't be read, or holds no key, or one that is too short.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: must hold keys as text, one a line") from None
    keys = [line.encode() for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path}: holds no key; write one a line")
    if any(len(key) < SHORTEST_KEY for key in keys):
        raise ConfigError(f"{path}: a key must have {SHORTEST_KEY} characters or more")
    return keys


class Guard:
    """Stands before the application: checks who asks, adds headers for safety, counts and logs each answer.

    A page of another site can make its visitor's browser send requests here. Without a key, a request must therefore be
    addressed to a loopback name (a foreign name that leads here is another site's), and none may come from another
    site's page. The log holds method, route, status and time, and nothing that a person wrote.

    Args:
        app: the application.
        keys: those of which a request must hold one; none for loopback alone.
    """

    def __init__(self, app: ASGIApp, *, keys: list[bytes], metrics: Metrics) -> None:
        self.app, self.keys, self.metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 0  # no status: the client has left before any answer

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Content-Security-Policy"] = POLICY
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self.app(scope, receive, answer)
            else:
                await _respond(refusal, scope, receive, answer)
        except Exception as error:
            # The log gets the place, and no message: it may quote what a person wrote.
            place = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s while answering:\n%s", type(error).__name__, place)
            if status == 0:
                message = "an error on the server, which its log tells of"
                await _respond(Refusal(500, message, code="server_error"), scope, receive, answer)
        finally:
            seconds = time.monotonic() - start
            route = _route_of(scope)
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            logger.info("%s %s %d %.3f s", scope["method"] if status != 405 else "-", route, status, seconds)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.keys and not is_loopback(_name_of(host)):
            message = (
                "without a key this server answers to localhost alone; start it with --api-key-file for other names"
            )
            return Refusal(421, message, code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and _place_of(origin) != host.lower():
            return Refusal(403, "requests from pages of other sites are refused", code="wrong_origin")
        if self.keys and scope["path"] not in OPEN:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip().encode() if scheme.lower() == "bearer" else b""
            right = [hmac.compare_digest(given, known) for known in self.keys]
            if not any(right):
                message = "send a key of this server in the header Authorization: Bearer KEY"
                return Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return None


async def _respond(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, send)


def _place_of(origin: str) -> str | None:
    """The host and port of an origin, or None where it has none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _name_of(host: str) -> str:
    """The name or address in a Host header, without the port."""
    if host.startswith("["):
        return host.partition("]")[0][1:]
    return host.partition(":")[0]


def _route_of(scope: Scope) -> str:
    """The path as its route has it, or "other": a path that no route has may hold anything."""
    route = getattr(scope.get("route"), "path", None)
    if route is not None:
        return str(route)
    return scope["path"] if scope["path"] in OPEN else "other"
