"""A web server on this machine that can stall, cut, lie, refuse and be slow, and that counts."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server:
    """The files of a folder, by GET alone: a context manager.

    Attributes:
        url: of the folder.
        asked: requests by name of the file.
        faults: by name of a file what to do with the next requests for it, in turn; see `_FAULTS`.
        always: the same of every request.
        begun: called with the name of a file, when a request for it is about to be answered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: Counter[str] = Counter()
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.always: dict[str, str] = {}
        self.begun: Callable[[str], object] = lambda name: None
        self.over = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/data"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.rpartition("/")[2]
        self.asked[name] += 1
        self.begun(name)
        path = self.folder / name
        left = self.faults[name]
        fault = left.pop(0) if left else self.always.get(name, "")
        if fault.isdigit() or not path.is_file():
            request.send_error(int(fault or 404))
            return
        data = path.read_bytes()
        sent = _FAULTS[fault](data)
        request.send_response(200)
        if fault != "drip":
            request.send_header("Content-Length", str(len(data) if fault in _CUT else len(sent)))
        request.end_headers()
        if fault == "slow":
            for start in range(0, len(sent), 4096):
                request.wfile.write(sent[start : start + 4096])
                time.sleep(0.02)
            return
        if fault == "drip":
            with suppress(OSError):  # who has given it up
                while not self.over.wait(0.02):
                    request.wfile.write(b" ")
            return
        request.wfile.write(sent)
        request.wfile.flush()
        if fault in ("stall", "mute"):
            self.over.wait(30)


_CUT = ("cut", "stall", "mute")
_FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    "slow": lambda data: data,
    "mute": lambda data: b"",
    "drip": lambda data: b"",
    "page": lambda data: b"<html>log in, please</html>",
    "stall": lambda data: data[: len(data) // 2],
    "cut": lambda data: data[: len(data) // 2],
    "short": lambda data: data[: len(data) // 2],
    "more": lambda data: data + b"x",
    "lie": lambda data: bytes([data[0] ^ 1]) + data[1:],
}
"""What is sent. `short` says that it is all there is; `cut` and `stall` promise the rest;
`drip` sends spaces without end; `500` and
other statuses are sent as such."""
