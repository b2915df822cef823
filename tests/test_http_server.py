"""What the reward server and the annotation page refuse before their endpoints see it, and what they outlast."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from fastapi import FastAPI, Request

from recipes import collect_preferences
from rlhf_t2i import http_server
from rlhf_t2i.access import listen
from rlhf_t2i.annotation.answers import Answers
from rlhf_t2i.annotation.serve import Service
from rlhf_t2i.http_server import Guard, listens_on_loopback
from rlhf_t2i.reward_server import server
from rlhf_t2i.rewards.load import as_weighted_sum
from rlhf_t2i.rewards.remote import RemoteReward
from rlhf_t2i.settings.reward_server import Config as ServerConfig
from tests import browser
from tests.servers import handling, running, served


@contextmanager
def echoing(*, loopback: bool = True) -> Iterator[tuple[str, list[bytes]]]:
    """A guarded server that keeps the bodies of its requests; yields its address and them."""
    app, bodies = FastAPI(), list[bytes]()

    async def keep(request: Request) -> dict[str, str]:
        bodies.append(await request.body())
        return {}

    app.add_api_route("/", keep, methods=["GET", "POST"], response_model=None)
    app.add_middleware(Guard, loopback=loopback, max_body_bytes=1000)
    with running(app) as address:
        yield address, bodies


def connected(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def status(address: str, request: bytes) -> bytes:
    """Send bytes, and return the status line of the response; empty if the connection is closed without one."""
    with connected(address) as client:
        client.sendall(request)
        return client.makefile("rb").readline()


@pytest.mark.parametrize(
    ("host", "served_hosts"),
    [(name, True) for name in ("127.0.0.1:80", "localhost", "[::1]:1", "127.1.2.3", "LOCALHOST:5")]
    + [
        (name, False)
        for name in ("evil.test", "evil.test:80", "127.0.0.1.evil.test", "8.8.8.8", "", "[", "localhost@x")
    ],
)
def test_on_a_loopback_address_only_its_own_names_are_served(host: str, served_hosts: bool) -> None:
    with echoing() as (address, bodies):
        response = httpx.get(address, headers={"Host": host}, trust_env=False)
        assert (response.status_code, len(bodies)) == ((200, 1) if served_hosts else (421, 0))


def test_other_hosts_are_served_where_other_machines_may_connect() -> None:
    with echoing(loopback=False) as (address, _):
        assert httpx.get(address, headers={"Host": "gpu1.lab"}, trust_env=False).status_code == 200


def test_requests_of_other_sites_are_refused_and_their_own_page_is_not() -> None:
    with echoing() as (address, bodies):
        for origin, code in (("http://evil.test", 403), ("null", 403), (address, 200)):
            assert httpx.post(address, headers={"Origin": origin}, trust_env=False).status_code == code
        assert len(bodies) == 1


def test_a_body_that_is_too_large_is_refused_before_it_is_sent_and_while_it_is_sent_in_chunks() -> None:
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
    with echoing() as (address, bodies):
        assert b" 413 " in status(address, head + b"Content-Length: 1001\r\n\r\n")
        assert b" 413 " in status(address, head + b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001)
        assert b" 200 " in status(address, head + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000)
        assert bodies == [b"x" * 1000]


def test_bodies_and_headers_have_time_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.3)
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
    with echoing() as (address, bodies):
        assert b" 408 " in status(address, head + b"Content-Length: 9\r\n\r\nx")
        for beginning in (b"", b"G", head):
            with connected(address) as client:
                client.sendall(beginning)
                with suppress(ConnectionResetError):
                    assert client.recv(1) == b""
        assert not bodies


def test_half_open_connections_do_not_silence_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has been silent for longest is ended; 1,100 of them took all descriptors of a process."""
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 20)
    with echoing() as (address, bodies), ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(connected(address)).sendall(b"GET / HTTP/1.1\r\nHost: ")
        for _ in range(3):
            assert httpx.get(address, trust_env=False).status_code == 200
        assert len(bodies) == 3


def test_a_request_in_progress_outlives_the_time_for_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.05)

    def slow(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        time.sleep(0.2)
        return images.mean((1, 2, 3))

    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with served(as_weighted_sum(slow)) as address:
        assert torch.equal(RemoteReward(address)(images, ["a", "b"]), images.mean((1, 2, 3)))


def test_a_socket_of_all_addresses_is_not_one_of_this_machine() -> None:
    for host, expected in (("127.0.0.1", True), ("0.0.0.0", False)):
        with socket.socket() as listener:
            listener.bind((host, 0))
            assert listens_on_loopback(listener) is expected


@pytest.mark.parametrize("command", ["reward server", "annotation page"])
def test_whoever_reads_the_printed_address_can_connect_at_once(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = list[socket.socket]()

    def run(sockets: list[socket.socket]) -> None:
        connections.append(socket.create_connection(sockets[0].getsockname()))
        sockets[0].close()

    for module in (server, collect_preferences):
        monkeypatch.setattr(module, "make_server", lambda *_, **__: SimpleNamespace(run=run))
    if command == "reward server":
        monkeypatch.setattr(server.signal, "signal", lambda *_: None)
        server.main(ServerConfig(rewards="jpeg_compressibility", port=0, device="cpu"))
    else:
        with closing(Answers(tmp_path, [], seed=0)) as answers:
            collect_preferences.serve(Service(answers, secret=None), listen("127.0.0.1", 0))
    connections[0].close()


@pytest.mark.slow
@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason=browser.MISSING)
def test_a_page_of_another_site_reaches_nothing_in_chromium() -> None:
    """By a host of its own that it lets point to this machine, and by a post that needs no permission."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with echoing() as (address, bodies), handling(Site) as site:
        port = urlsplit(address).port
        with browser.chromium("--host-resolver-rules=MAP evil.test 127.0.0.1") as page:
            page.open(f"http://evil.test:{port}/")
            assert "names of its own machine only" in page.run("return document.body.innerText")
            page.open(site)
            page.run(
                f"fetch('{address}', {{method: 'POST', mode: 'no-cors', body: 'x'}}).finally(() => window.done = 1)"
            )
            page.until("window.done")
            assert bodies == []
            page.open(address)
            page.run("fetch('/', {method: 'POST', body: 'own'}).finally(() => window.done = 1)")
            page.until("window.done")
            assert bodies == [b"", b"own"]
