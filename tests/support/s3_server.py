"""A local server of the S3 API (moto), with injectable faults."""

import re
import threading
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from msense.io import filesystems

Start = Callable[..., Any]
Fault = Callable[["Server", dict[str, Any], Start], Iterable[bytes]]
BUCKET = "s3://bucket"
KEY, SECRET = "AKIATESTKEYTESTKEY12", "hunter2hunter2hunter2"


class Server:
    """Moto's S3 behind a filter that injects faults; `seen` has the "METHOD key" of every request."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.seen: list[str] = []
        self._faults: list[tuple[re.Pattern, Fault, list[int]]] = []
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def empty(self) -> None:
        """Delete the buckets of all servers in this process."""
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset", method="POST")) as answer:
            assert answer.status == 200

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()

    def spoil(self, requests: str, fault: Fault, times: int) -> None:
        """Inject a fault into the next `times` requests whose "METHOD key" matches."""
        self._faults.append((re.compile(requests), fault, [times]))

    def heal(self) -> None:
        self._faults.clear()

    def _answer(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        name = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO'].lstrip('/')}"
        self.seen.append(name)
        for pattern, fault, left in self._faults:
            if left[0] > 0 and pattern.search(name):
                left[0] -= 1
                return fault(self, environ, start)
        return self.app(environ, start)


def files(uri: str) -> dict[str, bytes]:
    """Return the files of a folder, except done markers."""
    fs, path = filesystems.filesystem(uri)
    names = [name for name in fs.find(path) if not name.endswith(".done")]
    return {name.removeprefix(f"{path}/"): fs.cat_file(name) for name in names}


def dropped(server: Server, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    """The connection breaks in the middle of the request."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
    environ["werkzeug.socket"].shutdown(2)
    start("500 Never Received", [])
    return []


def cut(server: Server, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    """The connection breaks in the middle of the answer."""
    body = b"".join(server.app(environ, start))
    return [body[: len(body) // 2]]


def unheard(server: Server, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    """The store executes the request, but its answer is lost."""
    list(server.app(environ, lambda *_: lambda _: None))
    environ["werkzeug.socket"].shutdown(2)
    start("500 Never Received", [])
    return []


def answers(status: str, code: str) -> Fault:
    """Return a fault that answers with a status and code."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()

    def answer(server: Server, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body] if environ["REQUEST_METHOD"] != "HEAD" else []

    return answer


throttled = answers("503 Slow Down", "SlowDown")
