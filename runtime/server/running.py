"""The process of a server: connections, signals, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from lvlm.core.errors import ParameterError
from lvlm.runtime.server.events import PATIENCE
from lvlm.runtime.server.service import Service

log = logging.getLogger("lvlm.server")
HEAD_SECONDS = 10  # that the head of a request may take
HEAD_BYTES = 64 << 10  # of it, as far as it has come without its end
UPGRADE = re.compile(rb"(\r\n)upgrade:", re.IGNORECASE)
MAX_PIPELINED = 16  # requests that a client may send before the answer to another
LOOK = 0.05  # seconds between two looks at what is still going on
LEFT = 2.0  # seconds for the last words to those whose answers were given up


class Connection(HttpToolsProtocol):
    """A connection that is closed where the head of a request does not come in time, or is too
    large, and where its client reads nothing of what it is sent."""

    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None
    _in_head = False
    _head = 0  # bytes of a head that is not complete
    _earlier: tuple[RequestResponseCycle, ...] = ()

    def connection_made(self, transport: Any) -> None:
        # asyncio sees to that for some sockets only; else events wait 40 ms for one another
        own = transport.get_extra_info("socket")
        if own is not None and own.family in (socket.AF_INET, socket.AF_INET6):
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if self._late is None and idle:
            self._wait()
        began = self._in_head
        if idle or began:
            # httptools would take the body of a request that offers HTTP/2 for the other protocol's
            head, end, rest = data.partition(b"\r\n\r\n")
            data = UPGRADE.sub(rb"\1Ignored:", head) + end + rest  # as long as it was
        super().data_received(data)
        self._head = self._head + len(data) if began and self._in_head else 0
        if self._head > HEAD_BYTES:
            self._come()
            self._give_up()

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what comes behind a body is nobody's business
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._come()
        self._in_head = False
        self._read_on()
        earlier = self.cycle
        super().on_headers_complete()
        if earlier is not None and not earlier.response_complete:
            going = (one for one in self._earlier if not one.response_complete)
            self._earlier = (*going, earlier)
            if len(self.pipeline) <= MAX_PIPELINED:
                self.flow.resume_reading()  # else nobody sees that the client leaves

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._stuck is None and (left := self.transport.get_write_buffer_size()):
            self._watch(left)

    def connection_lost(self, exc: Exception | None) -> None:
        self._come()
        self._read_on()
        super().connection_lost(exc)
        for cycle in self._earlier:  # uvicorn tells the last one alone
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_on()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read_on()

    def _watch(self, left: int) -> None:
        self._stuck = self.loop.call_later(PATIENCE, self._look, left)

    def _look(self, before: int) -> None:
        self._stuck = None
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()  # close() would wait until it is read
        elif left:
            self._watch(left)

    def _read_on(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _wait(self) -> None:
        self._late = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _come(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Ends in order: at SIGTERM or Ctrl-C it is not ready any more, finishes what was begun within
    ``drain`` seconds, tells the others that it does not, and returns; a second signal shortens the
    wait."""

    def __init__(self, config: uvicorn.Config, service: Service, drain: float) -> None:
        super().__init__(config)
        self._service, self._drain = service, drain
        self._ending: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would raise the signal again at the end, and so the status would be its."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are others' there
            return
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def end(self) -> None:
        """Begin to end; once more: wait for no answer any more."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._finish())
        else:
            self._hurry.set()

    async def _finish(self) -> None:
        self._service.draining = True
        log.info("draining", extra={"fields": {"seconds": self._drain}})
        await self._idle(self._drain, self._hurry)
        # What is left ends with an answer that says why
        await self._service.close()
        await self._idle(LEFT, asyncio.Event())
        self.should_exit = True

    async def _idle(self, seconds: float, hurry: asyncio.Event) -> None:
        """Wait until no request is being answered, for so many seconds, or until there is a
        hurry."""
        until = time.monotonic() + seconds
        while self.server_state.tasks and time.monotonic() < until and not hurry.is_set():
            await asyncio.sleep(LOOK)


class JsonLines(logging.Formatter):
    """A line of JSON for each record."""

    def format(self, record: logging.LogRecord) -> str:
        data: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            data["error"] = self.formatException(record.exc_info)
        return json.dumps(data, ensure_ascii=False)


def set_logging(level: str) -> None:
    """Log records of the server, and of mistakes below it, on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, lowest in (("lvlm", level.upper()), ("uvicorn", "WARNING"), ("asyncio", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(lowest)


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve on. Raises ParameterError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ParameterError(f"--host {host} --port {port}: {reason}") from None


def configuration(
    app: FastAPI, certificate: str | None = None, key: str | None = None
) -> uvicorn.Config:
    """Configuration of uvicorn."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


def check_certificate(certificate: str, key: str) -> None:
    """Raises ParameterError unless it can be used."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ParameterError(f"--certificate and --certificate-key: {reason}") from None


def serve(config: uvicorn.Config, service: Service, place: socket.socket, drain: float) -> None:
    """Serve until a signal ends it."""
    Server(config, service, drain).run([place])
