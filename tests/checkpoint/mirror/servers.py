"""An S3 server on this machine for tests of mirrors, which can be gone, slow, or count."""

from __future__ import annotations

import logging
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

from ports import free_port

BUCKET = "runs"


class Server:
    """Moto's S3, on a port of this machine, in threads of this process.

    What it holds stays while it is stopped and started again.

    Attributes:
        on_request: called with the method and path of each request before it is answered; where it
            says True, the answer is that this is not allowed.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.on_request: Callable[[str, str], object] = lambda method, path: None
        self._server: Any = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client has to be told, as a person would tell it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "id-of-the-tests",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        inside = DomainDispatcherApplication(create_backend_app)

        def application(environment: dict[str, Any], start_response: Any) -> Any:
            if self.on_request(environment["REQUEST_METHOD"], environment["PATH_INFO"]) is True:
                start_response("403 Forbidden", [])
                return [b""]
            return inside(environment, start_response)

        self._server = make_server("127.0.0.1", self.port, application, threaded=True)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """As if the machine were gone: nobody listens any more."""
        self._server.shutdown()
        self._server.server_close()

    def make_bucket(self) -> None:
        """Empty, whatever was in it."""
        self.on_request = lambda method, path: None
        self._ask("POST", "/moto-api/reset")
        self._ask("PUT", f"/{BUCKET}")

    def _ask(self, method: str, path: str) -> None:
        url = f"http://127.0.0.1:{self.port}{path}"
        headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/x"}
        request = urllib.request.Request(url, b"", headers, method=method)
        urllib.request.urlopen(request, timeout=10).read()
