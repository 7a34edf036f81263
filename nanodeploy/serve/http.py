"""uvicorn's HTTP/1.1 protocol with the limits it lacks: on headers, on silence, on clients that never read."""

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from nanodeploy.serve import openai

MAX_HEADER_BYTES = 64 << 10
HEADER_TIMEOUT_S = 20.0  # from the connection, or from the first byte of the next request, to the end of the headers
STUCK_WRITE_S = 60.0  # a full buffer of which nothing leaves for so long belongs to a client that is gone
SEND_BUFFER_BYTES = 256 << 10  # the kernel's, per connection: bounds its memory, and shows progress in small steps


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._header_bytes = 0
        self._in_headers = True
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._refuse, 408, "The request did not arrive.")

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(431, f"The request's headers are longer than {MAX_HEADER_BYTES} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers, self._header_bytes = True, 0
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._refuse, 408, "The request did not end.")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_headers:
            return  # trailers of a chunked body; nobody reads them
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._watch_write(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _watch_write(self, waiting: int) -> None:
        """Cut the connection if its buffer still holds as much as now when the time is up; else look again."""

        def look() -> None:
            now_waiting = self.transport.get_write_buffer_size()
            if now_waiting < waiting:
                self._watch_write(now_waiting)
            else:
                self.transport.abort()

        self._write_timer = self.loop.call_later(STUCK_WRITE_S, look)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        """An answer below the application: the request never became one."""
        if self.transport.is_closing():
            return
        body = openai.to_json(openai.ErrorBody(openai.Error(message, "invalid_request_error")))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
