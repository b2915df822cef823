"""Faults of the clients of a reward server: mutated requests, and connections that stay half open."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import torch
import uvicorn
from PIL import Image
from torch import Tensor

from attacks.children import Outcome
from attacks.mutations import mutated
from rlhf_t2i.access import listen
from rlhf_t2i.reward_server.batcher import Batcher
from rlhf_t2i.reward_server.server import Service, create_app
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.rewards.wire_format import JSON, SAFETENSORS, pack

REQUESTS = 100
"""Mutated requests in one try."""
CONNECTIONS = 200
"""Half-open connections in one try."""
_ANSWER_S = 20.0
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a fox", "two cats"]


@contextmanager
def serving() -> Iterator[str]:
    """Serve a reward in a thread; yields its address."""
    batcher = Batcher(load_rewards("jpeg_compressibility", finite=False), device="cpu", batch_size=64, max_wait=0.001)
    service = Service(batcher, max_requests=64, max_images=64, max_bytes=2**22, secret=None)
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(service), access_log=False, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def as_json(images: Tensor) -> bytes:
    """Return a request of type JSON."""
    files: list[str] = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(buffer, "PNG")
        files.append(base64.b64encode(buffer.getvalue()).decode())
    return json.dumps({"prompts": PROMPTS, "images": files, "metadata": [{"prompt": p} for p in PROMPTS]}).encode()


def answers(client: httpx.Client, address: str, body: bytes) -> bool:
    """True if a valid request is answered with its scores."""
    response = client.post(f"{address}/score", content=body, headers={"Content-Type": SAFETENSORS}, timeout=_ANSWER_S)
    return response.status_code == 200 and len(response.json()["total"]) == len(PROMPTS)


def mutated_requests(work: Path, index: int, rng: random.Random) -> Outcome:
    """Send broken requests of both types: each is refused or answered as JSON, and the server goes on."""
    del work, index
    originals = {SAFETENSORS: pack(IMAGES, PROMPTS), JSON: as_json(IMAGES)}
    statuses: dict[int, int] = {}
    with serving() as address, httpx.Client(timeout=_ANSWER_S, trust_env=False) as client:
        for number in range(REQUESTS):
            kind = rng.choice(sorted(originals))
            body = mutated(originals[kind], rng)
            try:
                response = client.post(f"{address}/score", content=body, headers={"Content-Type": kind})
                fields = response.json()
            except (httpx.HTTPError, ValueError) as error:
                return Outcome(False, f"request {number}, {kind}: {type(error).__name__}: {str(error)[:200]}")
            status = response.status_code
            statuses[status] = statuses.get(status, 0) + 1
            if status not in (200, 413, 422) or not ({"total", "error"} & fields.keys()):
                return Outcome(False, f"request {number}, {kind}: {status}, {response.text[:200]}")
        alive = answers(client, address, originals[SAFETENSORS])
    return Outcome(alive, f"{statuses}, then a valid request {'was' if alive else 'was not'} answered")


def half_open(work: Path, index: int, rng: random.Random) -> Outcome:
    """Open connections that send a part of a request and stay; a valid request must still be answered."""
    del work, index
    head = f"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\nContent-Length: 1000\r\n\r\n{{".encode()
    with serving() as address, ExitStack() as stack, httpx.Client(timeout=_ANSWER_S, trust_env=False) as client:
        port = int(address.rpartition(":")[2])
        for _ in range(CONNECTIONS):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            connection.sendall(head[: rng.randrange(len(head) + 1)])
        try:
            alive, why = answers(client, address, pack(IMAGES, PROMPTS)), ""
        except httpx.HTTPError as error:
            alive, why = False, f": {type(error).__name__} {error}"
    return Outcome(alive, f"a valid request {'was' if alive else 'was not'} answered beside them{why}")
