"""HTTP on this machine that can be told to fail."""

import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves `files`, with ranges. Each of `faults` spoils a GET: "500", "403", "stall", "cut", "short", "no range"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.ranges: list[tuple[str, int, int]] = []  # (name, start, end) of what was asked for
        self.closing = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are expected here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *args) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        name = self.path.lstrip("/")
        whole = self.server.files.get(name)
        if whole is None:
            return self._end(404, b"")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(whole))
        fault = ""
        if body:
            self.server.ranges.append((name, start, end))
            fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault in ("500", "403"):
            return self._end(int(fault), b"")
        if fault == "no range":
            return self._end(200, whole)
        if fault == "stall":
            self.server.closing.wait(5)
        data = whole[start:end]
        if fault == "short":
            data = data[: len(data) // 2]
        self._end(206 if asked else 200, data, cut=fault == "cut", body=body)

    def _end(self, status: int, data: bytes, cut: bool = False, body: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            time.sleep(0.01)
            self.close_connection = True


@contextmanager
def serve() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()
