"""A small web server of the standard library: pages that are read and not written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOOPBACK = "127.0.0.1"
_NAMES = (LOOPBACK, "localhost", "[::1]")


@dataclass(frozen=True)
class Page:
    """What a path gives."""

    body: str
    kind: str = "text/html"
    status: HTTPStatus = HTTPStatus.OK


Answer = Callable[[str], Page]
"""From the path of a request, e.g. `/metrics`, to its page; called by a thread for each request."""


class PageServer:
    """Answers GET requests, each in a thread of its own, none of which keeps the process alive.

    On the loopback address it answers only who asks by a name of that address: a page of another site, whose name was
    made to lead here, gets nothing.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, host: str, port: int, answer: Answer) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Host", "").rsplit(":", 1)[0] if host == LOOPBACK else LOOPBACK
                if asked in _NAMES:
                    page = answer(self.path.partition("?")[0])
                else:
                    page = Page("ask by localhost\n", "text/plain", HTTPStatus.FORBIDDEN)
                body = page.body.encode()
                try:
                    self.send_response(page.status)
                    self.send_header("Content-Type", f"{page.kind}; charset=utf-8")
                    self.send_header("Content-Length", str(len(body)))
                    self.send_header("Cache-Control", "no-store")
                    self.end_headers()
                    self.wfile.write(body)
                except ConnectionError:  # who asked is gone
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self._host = host

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._server.server_port}"

    def start(self) -> None:
        """Serve in a thread, until `close`."""
        # `stop` waits for the next look at whether it was asked.
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="pages", daemon=True).start()

    def serve(self) -> None:
        """Serve in this thread, until an exception, e.g. of Ctrl-C."""
        self._server.serve_forever()

    def stop(self) -> None:
        """End `start`'s thread."""
        self._server.shutdown()
        self.close()

    def close(self) -> None:
        """Listen no more."""
        self._server.server_close()


def not_found(path: str) -> Page:
    return Page(f"nothing at {path}\n", "text/plain", HTTPStatus.NOT_FOUND)
