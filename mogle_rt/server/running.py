"""Runs the application until it is told to stop, and stops so that every request gets an answer."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from mogle_rt.errors import ConfigError

if TYPE_CHECKING:  # the port is looked at before the large libraries are loaded
    from mogle_rt.server.drawing import Studio

GRACE = 30.0  # seconds for what is being drawn when the server is to stop
GOODBYE = 5  # seconds for answers to be sent then
CONNECTIONS = 512


class Server(uvicorn.Server):
    """uvicorn's server, which first lets the studio finish.

    Args:
        config: uvicorn's.
        studio: is closed when the server is to stop.
        grace: seconds for what is being drawn then.
        ready: called when requests are answered.
    """

    def __init__(
        self, config: uvicorn.Config, studio: Studio, grace: float = GRACE, ready: Callable[[], object] = lambda: None
    ) -> None:
        super().__init__(config)
        self.studio, self.grace, self.ready = studio, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what waits and what comes, finish what is being drawn, then close the connections."""
        self.studio.close()
        await asyncio.to_thread(self.studio.join, self.grace)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        ConfigError: the address is in use, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        reason = error.strerror if isinstance(error, OSError) else "a port is a number up to 65535"
        raise ConfigError(f"can't listen on {host}, port {port}: {reason}; choose another with --port") from None
    listening.listen(CONNECTIONS)
    return listening


def make_server(
    app: FastAPI, studio: Studio, *, grace: float = GRACE, ready: Callable[[], object] = lambda: None
) -> Server:
    """A server of the application, to be run with a socket of `listen`."""
    logging.getLogger("uvicorn.access").disabled = True  # it logs addresses as they were sent; `access.Guard` doesn't
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=GOODBYE,
        limit_concurrency=CONNECTIONS,
    )
    return Server(config, studio, grace, ready)
