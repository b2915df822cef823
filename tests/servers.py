"""Servers in threads of the test process, and free ports for them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true, for 30 seconds at most."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def running(app: Any, *, port: int = 0) -> Iterator[str]:
    """Serve an ASGI application with uvicorn in a thread; yields its address."""
    from rlhf_t2i.access import listen
    from rlhf_t2i.http_server import make_server

    listener = listen("127.0.0.1", port)
    server = make_server(app, log_config=None, lifespan="auto")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def handling(handler: type[BaseHTTPRequestHandler], *, port: int = 0) -> Iterator[str]:
    """Serve requests with a handler of the standard library in a thread; yields the server's address."""
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def served(reward: Any) -> Iterator[str]:
    """Serve a weighted sum of rewards over HTTP in a thread of this process; yields its address."""
    from rlhf_t2i.reward_server.batcher import Batcher
    from rlhf_t2i.reward_server.server import Service, create_app

    batcher = Batcher(reward, device="cpu", batch_size=64, max_wait=0.005)
    service = Service(batcher, max_requests=8, max_images=64, max_bytes=2**24, secret=None)
    with running(create_app(service)) as address:
        yield address


Response = tuple[int, dict[str, str], str]
"""Status, headers and body."""


@dataclass
class Scripted:
    """A server that sends the next response of a list, and its last one from then on; None closes the connection."""

    responses: list[Response | None]
    times: list[float] = field(default_factory=list)
    """When each request came."""
    requests: list[Any] = field(default_factory=list)
    """What each POST with JSON held, and the path of each GET."""
    address: str = ""


@contextmanager
def scripted(*responses: Response | None, port: int = 0) -> Iterator[Scripted]:
    """Serve a script over HTTP; ECHO in a header or body becomes the request's Authorization header."""
    script = Scripted(list(responses))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            script.times.append(time.monotonic())
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            is_json = "json" in self.headers.get("Content-Type", "")
            script.requests.append(json.loads(body) if is_json else self.path)
            response = script.responses[min(len(script.times), len(script.responses)) - 1]
            if response is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, headers, text = response
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value.replace("ECHO", self.headers.get("Authorization", "")))
            body = text.replace("ECHO", self.headers.get("Authorization", "")).encode()
            if "Content-Length" not in headers:  # a larger one than the body's is half a response
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with handling(Handler, port=port) as script.address:
        yield script


def scores_response(*scores: Any) -> Response:
    """Return the response of a reward server with these totals."""
    return 200, {"Content-Type": "application/json"}, json.dumps({"total": list(scores)})
