"""A reward server returns the scores of the local reward, whatever happens on the way."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save
from torch import Tensor

from recipes import ddpo
from rlhf_t2i.access import TOKEN_VARIABLE, listen
from rlhf_t2i.config import parse_config
from rlhf_t2i.prompt_rows import as_prompts
from rlhf_t2i.reward_server.batcher import Batcher
from rlhf_t2i.reward_server.server import Config, Service, create_app
from rlhf_t2i.rewards.gradient import require_gradient
from rlhf_t2i.rewards.load import CheckedReward, WeightedSum, load_reward, load_rewards
from rlhf_t2i.rewards.remote import RemoteReward
from rlhf_t2i.rewards.wire_format import JSON, SAFETENSORS, pack
from tests import processes
from tests.runs import RednessOfRows, as_for_toy_models, redness, rows, state
from tests.servers import free_port, running, scores_response, scripted, until

ROOT = Path(__file__).parent.parent
PROMPTS = [f"a fox number {i}" for i in range(7)]
IMAGES = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
TOKEN = "open-sesame-0123456789"


def length(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.tensor([float(len(prompt)) for prompt in prompts])


@dataclass
class Counting:
    """Redness that records the number of images in each forward pass and waits until `open` is set."""

    calls: list[int] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls.append(len(images))
        assert self.open.wait(30)
        if "a bad prompt" in prompts:
            raise ValueError("'a bad prompt' has no score.")
        return redness(images, [])


@dataclass
class RewardServer:
    address: str
    service: Service

    def post(self, body: bytes, content_type: str = SAFETENSORS, **headers: str) -> httpx.Response:
        with httpx.Client(trust_env=False, timeout=30) as client:
            return client.post(f"{self.address}/score", content=body, headers={"Content-Type": content_type, **headers})

    def get(self, path: str, **headers: str) -> httpx.Response:
        with httpx.Client(trust_env=False, timeout=30) as client:
            return client.get(self.address + path, headers=headers)

    @property
    def num_waiting(self) -> int:
        return self.service.batcher.num_waiting

    @property
    def num_images(self) -> int:
        """Images scored so far."""
        return int(self.metric("images_total"))

    @property
    def responses(self) -> dict[int, int]:
        """Number of responses by HTTP status."""
        (family,) = [family for family in self.families() if family.name == "rlhf_t2i_requests"]
        samples = [sample for sample in family.samples if sample.name == "rlhf_t2i_requests_total"]
        return {int(sample.labels["status"]): int(sample.value) for sample in samples}

    def metric(self, name: str, **labels: str) -> float:
        value = self.service.batcher.metrics.registry.get_sample_value(f"rlhf_t2i_{name}", labels)
        assert value is not None, name
        return value

    def families(self) -> list[Any]:
        return list(text_string_to_metric_families(self.service.batcher.metrics.text().decode()))


@contextmanager
def serving(*rewards: Any, port: int = 0, batch_size: int = 64, secret: str | None = None, **limits: int) -> Any:
    """A reward server in a thread of this process, for an unweighted sum of functions."""
    terms = tuple((CheckedReward(f"reward{i}", reward, finite=False), 1.0) for i, reward in enumerate(rewards))
    batcher = Batcher(WeightedSum(terms), device="cpu", batch_size=batch_size, max_wait=0.005)
    service = Service(batcher, **{"max_requests": 64, "max_images": 1024, "max_bytes": 2**20, **limits}, secret=secret)
    with running(create_app(service), port=port) as address:
        try:
            yield RewardServer(address, service)
        finally:
            for reward in rewards:
                if isinstance(reward, Counting):
                    reward.open.set()


def png(*, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> str:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# --- the same scores ------------------------------------------------------------------------------


def test_a_remote_reward_is_the_local_one_to_the_bit() -> None:
    """Pixels beyond [0, 1] included; weighted and named like any other."""
    with serving(redness, length) as server:
        total, each = load_rewards(f"{server.address}=0.5, {__name__}:length")(IMAGES, PROMPTS)
    expected = redness(IMAGES, PROMPTS) + length(IMAGES, PROMPTS)
    assert torch.equal(each[server.address], expected)
    assert torch.equal(total, 0.5 * expected + length(IMAGES, PROMPTS))
    assert list(each) == [server.address, f"{__name__}:length"]


def test_the_built_in_reward_model_gives_the_same_bits_locally_and_remotely() -> None:
    images = torch.rand(70, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prompts = ["a red circle on a blue background", "a green square on a white background"] * 35
    reward = load_reward("llava_reward")
    with serving(reward.function) as server, torch.no_grad():
        assert torch.equal(RemoteReward(server.address)(images, prompts), reward(images, prompts))


def test_the_rows_of_prompts_reach_a_remote_reward_that_needs_them() -> None:
    known = as_prompts([{"prompt": prompt, "text": prompt.upper()} for prompt in PROMPTS])
    with serving(RednessOfRows()) as server:
        assert torch.equal(RemoteReward(server.address, part_size=3)(IMAGES, known), redness(IMAGES, PROMPTS))
        with pytest.raises(RuntimeError, match=r"returned 422 for 7 images: prompt 1 has no 'text', which the reward"):
            RemoteReward(server.address)(IMAGES, [known[0], *PROMPTS[1:]])


def test_a_response_has_the_unweighted_scores_of_each_reward() -> None:
    parts = ((CheckedReward("redness", redness), 2.0), (CheckedReward("length", length), -0.5))
    with serving(redness) as server:
        server.service.batcher.reward = WeightedSum(parts)
        response = server.post(pack(IMAGES, PROMPTS)).json()
    assert response["scores"] == {"redness": redness(IMAGES, []).tolist(), "length": length(IMAGES, PROMPTS).tolist()}
    assert response["total"] == (2 * redness(IMAGES, []) - 0.5 * length(IMAGES, PROMPTS)).tolist()


def test_float16_uint8_and_png_pixels_are_scored_as_their_values_in_float32() -> None:
    bytes_ = (IMAGES.clamp(0, 1) * 255).round()
    with serving(redness) as server:
        of_float16 = RemoteReward(server.address, pixels=torch.float16)(IMAGES, PROMPTS)
        of_uint8 = RemoteReward(server.address, pixels=torch.uint8)(IMAGES, PROMPTS)
        files = []
        for image in bytes_.permute(0, 2, 3, 1).numpy().astype(np.uint8):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            files.append(base64.b64encode(buffer.getvalue()).decode())
        of_png = server.post(json.dumps({"prompts": PROMPTS, "images": files}).encode(), JSON).json()["total"]
    assert torch.equal(of_float16, redness(IMAGES.half().float(), PROMPTS))
    assert torch.equal(of_uint8, redness(bytes_ / 255, PROMPTS))
    assert of_png == of_uint8.tolist()


def test_bfloat16_images_and_unicode_prompts_arrive() -> None:
    prompts = ["ein Füchslein 🦊", 'a "quoted" \\ fox\n'] * 2
    with serving(length, redness) as server:
        scores = RemoteReward(server.address)(IMAGES[:4].bfloat16(), prompts)
    assert torch.equal(scores, length(IMAGES[:4], prompts) + redness(IMAGES[:4].bfloat16().float(), prompts))


def test_no_images_give_no_scores_and_send_no_request() -> None:
    assert RemoteReward("http://127.0.0.1:1")(IMAGES[:0], []).shape == (0,)


def test_a_remote_reward_works_inside_a_running_event_loop() -> None:
    async def cell(address: str) -> Tensor:
        return RemoteReward(address)(IMAGES, PROMPTS)

    with serving(redness) as server:
        assert torch.equal(asyncio.run(cell(server.address)), redness(IMAGES, PROMPTS))


# --- batching -------------------------------------------------------------------------------------


def test_requests_that_wait_share_a_forward_pass_and_each_gets_its_own_scores() -> None:
    """While one image is scored, five trainers send two each: eight of these ten fit into the next pass."""
    counting = Counting()
    with serving(counting, batch_size=8) as server, ThreadPoolExecutor(6) as trainers:
        reward = RemoteReward(server.address)
        first = trainers.submit(reward, IMAGES[:1], PROMPTS[:1])
        until(lambda: counting.calls == [1])
        pairs = [trainers.submit(reward, IMAGES[i : i + 2], PROMPTS[i : i + 2]) for i in range(5)]
        until(lambda: server.num_waiting == 5)
        counting.open.set()
        assert torch.equal(first.result(), redness(IMAGES[:1], []))
        for i, pair in enumerate(pairs):
            assert torch.equal(pair.result(), redness(IMAGES[i : i + 2], []))
    assert counting.calls == [1, 8, 2]


def test_images_of_another_size_wait_for_a_pass_of_their_own() -> None:
    counting = Counting()
    other = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    with serving(counting) as server, ThreadPoolExecutor(4) as trainers:
        reward = RemoteReward(server.address)
        tasks = []
        for images in (IMAGES[:1], IMAGES[1:3], IMAGES[3:5], other):
            tasks.append((images, trainers.submit(reward, images, PROMPTS[: len(images)])))
            until(lambda: counting.calls == [1] and server.num_waiting == len(tasks) - 1)
        counting.open.set()
        for images, task in tasks:
            assert torch.equal(task.result(), redness(images, []))
    assert counting.calls == [1, 4, 2]


def test_a_request_that_the_reward_refuses_fails_alone() -> None:
    counting = Counting()
    with serving(counting) as server, ThreadPoolExecutor(3) as trainers:
        reward = RemoteReward(server.address)
        first = trainers.submit(reward, IMAGES[:1], PROMPTS[:1])
        until(lambda: counting.calls == [1])
        good = trainers.submit(reward, IMAGES[:2], PROMPTS[:2])
        bad = trainers.submit(reward, IMAGES[2:3], ["a bad prompt"])
        until(lambda: server.num_waiting == 2)
        counting.open.set()
        first.result()
        assert torch.equal(good.result(), redness(IMAGES[:2], []))
        with pytest.raises(RuntimeError, match=f"{server.address} returned 422 for 1 images: 'a bad prompt' has no"):
            bad.result()
    assert counting.calls[:2] == [1, 3]


def test_more_images_than_fit_into_a_forward_pass_are_scored_in_several() -> None:
    counting = Counting()
    counting.open.set()
    with serving(counting, batch_size=3) as server:
        assert torch.equal(RemoteReward(server.address)(IMAGES, PROMPTS), redness(IMAGES, []))
    assert counting.calls == [3, 3, 1]


def test_a_request_whose_client_disconnected_is_not_scored() -> None:
    counting = Counting()
    with serving(counting) as server, ThreadPoolExecutor(1) as trainer:
        first = trainer.submit(RemoteReward(server.address), IMAGES[:1], PROMPTS[:1])
        until(lambda: counting.calls == [1])
        impatient = RemoteReward(server.address, timeout=0.3)
        with pytest.raises(TimeoutError):
            impatient(IMAGES[:5], PROMPTS[:5])
        counting.open.set()
        first.result()
        until(lambda: server.service.num_accepted == 0)
    assert counting.calls == [1]


def test_the_metrics_count_requests_images_and_batches_in_the_format_of_prometheus() -> None:
    with serving(redness) as server:
        for count in (1, 3, 7):
            server.post(pack(IMAGES[:count], PROMPTS[:count]))
        server.post(b"nonsense")
        response = server.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name.removeprefix("rlhf_t2i_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    expected = {
        ("requests_total", "200"): 3,
        ("requests_total", "422"): 1,
        ("images_total",): 11,
        ("queue_length",): 0,
        ("scoring_errors_total",): 0,
        ("batch_images_bucket", "1.0"): 1,
        ("batch_images_bucket", "4.0"): 2,
        ("batch_images_bucket", "+Inf"): 3,
        ("batch_images_count",): 3,
        ("batch_images_sum",): 11,
    }
    assert {name: found[name] for name in expected} == expected
    assert 0 < found["scoring_seconds_total",] < found["request_seconds_total",]


def test_two_servers_in_one_process_count_apart() -> None:
    with serving(redness) as one, serving(redness) as other:
        one.post(pack(IMAGES, PROMPTS))
        assert (one.num_images, other.num_images) == (7, 0)


# --- too much at once -----------------------------------------------------------------------------


def test_a_full_server_responds_with_retry_after_and_a_trainer_retries() -> None:
    counting = Counting()
    with serving(counting, max_requests=1) as server, ThreadPoolExecutor(2) as trainers:
        first = trainers.submit(RemoteReward(server.address), IMAGES[:1], PROMPTS[:1])
        until(lambda: counting.calls == [1])
        refused = server.post(pack(IMAGES, PROMPTS))
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "1"
        second = trainers.submit(RemoteReward(server.address), IMAGES, PROMPTS)
        until(lambda: server.responses[503] >= 2)
        counting.open.set()
        first.result()
        assert torch.equal(second.result(), redness(IMAGES, []))
    assert counting.calls == [1, 7]


def test_a_request_is_not_repeated_before_retry_after() -> None:
    with scripted((503, {"Retry-After": "1"}, ""), scores_response(*range(7))) as server:
        assert RemoteReward(server.address)(IMAGES, PROMPTS).tolist() == list(range(7))
    assert server.times[1] - server.times[0] >= 1


def test_the_delay_between_attempts_doubles() -> None:
    with scripted((502, {}, ""), (504, {}, ""), None, scores_response(*range(7))) as server:
        assert RemoteReward(server.address)(IMAGES, PROMPTS).tolist() == list(range(7))
    waits = [after - before for before, after in pairwise(server.times)]
    assert len(waits) == 3
    assert all(wait >= least for wait, least in zip(waits, (0.2, 0.4, 0.8), strict=True))


@pytest.mark.parametrize("size", [8, 512])
def test_a_body_that_is_too_large_is_refused_with_the_limit_even_while_it_is_sent(size: int) -> None:
    """The larger one exceeds the buffers of the sockets."""
    images = torch.zeros(3, 3, size, size)
    with (
        serving(redness, max_bytes=2**10) as server,
        pytest.raises(RuntimeError, match=rf"{server.address} returned 413 for 3 images: .* MB.*--max_body_mb"),
    ):
        RemoteReward(server.address)(images, PROMPTS[:3])
    assert server.responses == {413: 1}


def test_images_that_are_large_only_when_decoded_are_refused() -> None:
    """A PNG of 2 MB in 10 kB, and bytes that are four times as much in float32."""
    with serving(redness, max_bytes=2**20) as server:
        bomb = json.dumps({"prompts": ["a fox"], "images": [png(size=(1000, 1000))]}).encode()
        large = pack(torch.zeros(1, 3, 400, 400), ["a fox"], pixels=torch.uint8)
        assert max(len(bomb), len(large)) < 2**19
        assert [server.post(bomb, JSON).status_code, server.post(large).status_code] == [413, 413]


def test_too_many_images_are_refused_with_the_limit() -> None:
    with serving(redness, max_images=5) as server:
        with pytest.raises(RuntimeError, match=r"413 for 7 images: There are 7 images; a request may have at most 5 "):
            RemoteReward(server.address)(IMAGES, PROMPTS)
        assert torch.equal(RemoteReward(server.address, part_size=5)(IMAGES, PROMPTS), redness(IMAGES, []))


# --- invalid requests -----------------------------------------------------------------------------


class Trap:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("opened",)


BAD_REQUESTS = {
    "nothing": (b"", SAFETENSORS, "no safetensors file"),
    "half": (pack(IMAGES, PROMPTS)[:-1], SAFETENSORS, "no safetensors file"),
    "pickle": (pickle.dumps(Trap()), SAFETENSORS, "no safetensors file"),
    "unknown type": (pickle.dumps(Trap()), "application/octet-stream", "content type is 'application/octet-stream'"),
    "no metadata": (save({"images": IMAGES}), SAFETENSORS, "no safetensors file with `prompts`"),
    "no images": (save({"x": IMAGES}, {"prompts": "[]"}), SAFETENSORS, "it is none"),
    "integers": (save({"images": IMAGES.int()}, {"prompts": "[]"}), SAFETENSORS, r"it is int32 \(7, 3, 8, 8\)"),
    "one image": (save({"images": IMAGES[0]}, {"prompts": "[]"}), SAFETENSORS, r"it is float32 \(3, 8, 8\)"),
    "four channels": (
        save({"images": torch.zeros(1, 4, 8, 8)}, {"prompts": '[""]'}), SAFETENSORS, r"it is float32 \(1, 4, 8, 8\)"
    ),
    "no rows": (save({"images": IMAGES[:0]}, {"prompts": "[]"}), SAFETENSORS, r"it is float32 \(0, 3, 8, 8\)"),
    "few prompts": (pack(IMAGES, PROMPTS[:2]), SAFETENSORS, "There are 7 images and 2 prompts"),
    "numbers": (save({"images": IMAGES}, {"prompts": "[1]"}), SAFETENSORS, "must be a JSON list of strings"),
    "a string": (save({"images": IMAGES}, {"prompts": '"a fox"'}), SAFETENSORS, "must be a JSON list of strings"),
    "deep": (b"[" * 100_000, JSON, "no JSON"),
    "list": (b"[]", JSON, "no JSON"),
    "not base64": (b'{"prompts": ["a"], "images": ["?"]}', JSON, "in base64"),
    "no PNG": (b'{"prompts": ["a"], "images": ["AAAA"]}', JSON, "PNG images cannot be used"),
    "half a PNG": (
        json.dumps({"prompts": ["a"], "images": [png(size=(200, 200))[:200]]}).encode(), JSON, "cannot be used"
    ),
    "two sizes": (
        json.dumps({"prompts": ["a", "b"], "images": [png(), png(size=(8, 9))]}).encode(), JSON,
        "of one size, but are RGB 8 x 8, RGB 8 x 9",
    ),
    "transparent": (json.dumps({"prompts": ["a"], "images": [png(mode="RGBA")]}).encode(), JSON, "RGBA 8 x 8"),
    "16 bits": (json.dumps({"prompts": ["a"], "images": [png(mode="I;16")]}).encode(), JSON, "I;16 8 x 8"),
}  # fmt: skip


def test_a_bad_request_gets_the_reason_and_the_server_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(redness) as server:
        for name, (body, content_type, message) in BAD_REQUESTS.items():
            response = server.post(body, content_type)
            assert response.status_code == 422, name
            assert re.search(message, response.json()["error"]), (name, response.text)
        assert torch.equal(RemoteReward(server.address)(IMAGES, PROMPTS), redness(IMAGES, []))
        assert server.get("/nowhere").json() == {"error": "Not Found"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("no such prompt"), 422, "no such prompt"),
        (KeyError("fox"), 500, "KeyError: 'fox'"),
        (RuntimeError("out of memory"), 500, "RuntimeError: out of memory"),
        (StopIteration(), 500, "StopIteration"),
        (SystemExit(3), 500, "SystemExit: 3"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_exception_of_the_reward_is_a_response_with_its_message(
    error: BaseException, status: int, message: str
) -> None:
    def failing(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if prompts[0] == "a fox":
            raise error
        return redness(images, prompts)

    with serving(failing) as server:
        reward = RemoteReward(server.address)
        with pytest.raises(RuntimeError, match=f"{server.address} returned {status} for 1 images: {message}"):
            reward(IMAGES[:1], ["a fox"])
        assert torch.equal(reward(IMAGES, PROMPTS), redness(IMAGES, []))
        assert server.responses == {status: 1, 200: 1}
        assert server.metric("scoring_errors_total") == 1


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_scores_that_are_not_finite_travel_as_valid_json() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1.5])
    with serving(lambda images, prompts: odd[: len(images)]) as server:
        response = server.post(pack(IMAGES[:4], PROMPTS[:4])).text
        assert json.loads(response, parse_constant=refuse_constant)["total"] == ["nan", "inf", "-inf", 1.5]
        scores = load_reward(server.address, finite=False)(IMAGES[:4], PROMPTS[:4])
        assert torch.equal(scores.nan_to_num(7, 8, 9), odd.nan_to_num(7, 8, 9))
        with pytest.raises(ValueError, match=f"{server.address} returned nan for the prompt 'a fox number 0'; rewards"):
            load_reward(server.address)(IMAGES[:4], PROMPTS[:4])


# --- the token ------------------------------------------------------------------------------------


def test_requests_need_the_token_and_no_message_or_log_shows_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    shown: list[str] = []
    with serving(redness, secret=TOKEN) as server:
        reward = RemoteReward(server.address)
        with pytest.raises(
            PermissionError,
            match=f"{server.address} returned 401: the environment variable {TOKEN_VARIABLE} is not set",
        ) as e:
            reward(IMAGES, PROMPTS)
        shown.append(str(e.value))
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN + "0")
        with pytest.raises(PermissionError, match="is not the server's token") as e:
            reward(IMAGES, PROMPTS)
        shown.append(str(e.value))
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        assert torch.equal(reward(IMAGES, PROMPTS), redness(IMAGES, []))
        for given in ("", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}0"):
            response = server.post(pack(IMAGES, PROMPTS), Authorization=given)
            assert response.status_code == 401
            shown.append(response.text)
        assert server.get("/health").json() == {"status": "ok", "needs_groups": False}
        assert server.get("/metrics").status_code == 401
        assert server.get("/metrics", Authorization=f"Bearer {TOKEN}").status_code == 200
        assert server.responses == {401: 7, 200: 1}
    assert TOKEN not in caplog.text + "".join(shown) + repr(reward) + repr(vars(reward))


def test_a_token_that_a_server_echoes_is_masked_in_messages_and_logs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    filling = "x" * 280
    for status, body in ((500, "you sent ECHO"), (500, json.dumps({"error": "ECHO"})), (200, filling + "ECHO")):
        with scripted((503, {}, "ECHO"), (status, {}, body)) as server:
            with pytest.raises((RuntimeError, ValueError)) as caught:
                RemoteReward(server.address)(IMAGES, PROMPTS)
            assert TOKEN[:6] not in str(caught.value) + caplog.text
            assert "Bearer ***" in str(caught.value)


@pytest.mark.parametrize("secret", ["two words", "Schlüssel", "line\nbreak"])
def test_a_token_that_no_header_can_carry_is_refused_without_showing_it(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, secret)
    with pytest.raises(ValueError, match=f"{TOKEN_VARIABLE} has blanks or letters beyond ASCII") as caught:
        RemoteReward("http://127.0.0.1:1")(IMAGES, PROMPTS)
    assert secret not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "rewards.example"])
def test_a_public_address_needs_a_token(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for unset in ("", "  "):
        monkeypatch.setenv(TOKEN_VARIABLE, unset)
        with pytest.raises(SystemExit):
            parse_config(Config, description="", arguments=["--host", host])
        error = capsys.readouterr().err
        assert f"host is {host}; it must be 127.0.0.1, ::1 or localhost unless" in error
        assert TOKEN_VARIABLE in error
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert parse_config(Config, description="", arguments=["--host", host]).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_loopback_address_needs_no_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert Config(host=host).host == host


def test_a_loopback_address_needs_a_token_if_one_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=f"require_token is True; it must be false unless the .* {TOKEN_VARIABLE} has"):
        Config(require_token=True)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert Config(require_token=True).host == "127.0.0.1"


@pytest.mark.parametrize("name", ["max_body_mb", "max_images", "max_requests", "microbatch_size"])
def test_a_limit_of_zero_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        Config(**{name: 0})


def test_a_port_in_use_is_named() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=rf"127\.0\.0\.1, port {port}: Address already in use\. .* another --port"):
            listen("127.0.0.1", port)


# --- responses that cannot be used ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ((200, {"Content-Type": "text/html"}, "<html>Login</html>"), "text/html that begins with <html>Login"),
        ((200, {}, ""), "returned an empty body; it must return JSON"),
        (scores_response(1.0, 2.0), "returned 2 scores for 7 images"),
        (scores_response(*range(8)), "returned 8 scores for 7 images"),
        (scores_response(1, 2, 3, None, 5, 6, 7), "it must return JSON with a list of numbers"),
        (scores_response(1, 2, 3, 10**400, 5, 6, 7), "it must return JSON with a list of numbers"),
        ((200, {}, '{"total": "1234567"}'), "it must return JSON with a list of numbers"),
        ((200, {}, '{"scores": [1, 2, 3, 4, 5, 6, 7]}'), "it must return JSON with a list of numbers"),
        (scores_response(1, 2, 3, "nan", 5, 6, 7), "returned nan for the prompt 'a fox number 3'"),
        (scores_response(1, 2, 3, True, 5, 6, 7), "it must return JSON with a list of numbers"),
        (scores_response(1, 2, 3, "4", 5, 6, 7), "it must return JSON with a list of numbers"),
        ((200, {}, '{"total": [1, 2, 3, NaN, 5, 6, 7]}'), "it must return JSON with a list of numbers"),
        ((200, {}, '{"total": ' + "[" * 100_000), "it must return JSON with a list of numbers"),
        ((200, {"Content-Type": "text/plain; charset=zlib"}, "x"), "it must return JSON with a list of numbers"),
        ((200, {"Content-Encoding": "gzip"}, "x"), "sent a body compressed by 'gzip', which was not asked for"),
        ((500, {"X": "y"}, "red \x1b[31m \u202e text"), r"returned 500 .* red \?\[31m \? text"),
        ((500, {}, '{"error": "red \\u001b[31m"}'), r"returned 500 for 7 images: red \?\[31m"),
        ((500, {}, "x" * (17 << 20)), "sent more than 16 MB"),
        (scores_response(1, 2, 3, 4, 5, 6, 1e39), "returned inf for the prompt 'a fox number 6'"),
        ((404, {}, "no such page"), "returned 404 for 7 images: something that begins with no such page"),
        ((302, {"Location": "http://127.0.0.1:1/"}, ""), "returned 302 for 7 images"),
        ((413, {"Content-Type": "text/html"}, "<h1>Too large"), "returned 413 for 7 images: text/html that"),
    ],
)
def test_an_unusable_response_is_an_error_with_the_server_and_is_not_requested_again(
    response: tuple[int, dict[str, str], str], message: str
) -> None:
    with scripted(response) as server:
        with pytest.raises((ValueError, RuntimeError), match=message) as caught:
            RemoteReward(server.address)(IMAGES, PROMPTS)
        assert server.address in str(caught.value)
        assert len(server.times) == 1


def test_an_unusable_response_cancels_the_requests_to_all_servers() -> None:
    counting = Counting()
    with serving(counting) as busy, scripted((500, {}, "broken")) as broken:
        with pytest.raises(RuntimeError, match=f"{broken.address} returned 500"):
            RemoteReward(f"{busy.address}|{broken.address}")(IMAGES, PROMPTS)
        counting.open.set()


# --- servers that are slow, dead, or several ------------------------------------------------------


def test_several_servers_share_unevenly_many_images_and_the_order_is_kept() -> None:
    delays = random.Random(0)

    def slowly(images: Tensor, prompts: Sequence[str]) -> Tensor:
        time.sleep(delays.uniform(0, 0.1))
        return redness(images, prompts)

    pixels = torch.rand(23, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prompts = [str(i) for i in range(23)]
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(slowly)) for _ in range(3)]
        reward = RemoteReward("|".join(server.address for server in servers), part_size=2)
        assert torch.equal(reward(pixels, prompts), redness(pixels, prompts))
        shares = [server.num_images for server in servers]
    assert sum(shares) == 23
    assert min(shares) > 0


def test_every_server_has_its_share_of_few_images() -> None:
    with serving(redness) as one, serving(redness) as other:
        reward = RemoteReward(f"{one.address} | {other.address}/")
        for count in (1, 2, 5, 7):
            before = [server.num_images for server in (one, other)]
            assert torch.equal(reward(IMAGES[:count], PROMPTS[:count]), redness(IMAGES[:count], []))
            after = [server.num_images for server in (one, other)]
            assert max(b - a for a, b in zip(before, after, strict=True)) == (count + 1) // 2


@pytest.mark.parametrize("dead_first", [True, False])
def test_the_part_of_a_dead_server_goes_to_the_other(dead_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    with serving(redness) as alive:
        both = [dead, alive.address] if dead_first else [alive.address, dead]
        reward = RemoteReward("|".join(both), part_size=2)
        for _ in range(2):
            assert torch.equal(reward(IMAGES, PROMPTS), redness(IMAGES, []))
    assert f"{dead}: Connection refused; next attempt in" in caplog.text


def test_the_part_of_a_server_that_hangs_goes_to_the_other() -> None:
    stuck = Counting()
    with serving(stuck) as hanging, serving(redness) as alive:
        reward = RemoteReward(f"{hanging.address}|{alive.address}", attempt_timeout=0.3)
        assert torch.equal(reward(IMAGES, PROMPTS), redness(IMAGES, []))
    assert stuck.calls == [4]


def test_a_server_that_dies_in_the_middle_is_waited_for_until_it_is_back() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as trainer:
        with scripted(None, port=port) as dying:
            task = trainer.submit(RemoteReward(dying.address, part_size=3), IMAGES, PROMPTS)
            until(lambda: dying.times)
        time.sleep(0.3)
        assert not task.done()
        with serving(redness, port=port):
            assert torch.equal(task.result(), redness(IMAGES, []))


def test_a_slow_server_is_an_error_in_the_end_with_the_first_prompt_that_has_no_score() -> None:
    counting, count = Counting(), iter(range(100))

    def stuck_at_the_third(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return counting(images, prompts) if next(count) == 2 else redness(images, prompts)

    with serving(stuck_at_the_third) as server:
        message = r"prompt 'a fox number 4' \(image 4 of 7\) came within 0.5 s from " + server.address + r" \(slow\)"
        with pytest.raises(TimeoutError, match=message):
            RemoteReward(server.address, timeout=0.5, part_size=2)(IMAGES, PROMPTS)
        counting.open.set()


def test_dead_servers_are_all_named_with_their_trouble() -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    with scripted((503, {"Retry-After": "60"}, "full")) as full:
        with pytest.raises(TimeoutError, match="'a fox number 0'") as caught:
            RemoteReward(f"{dead}|{full.address}", timeout=0.5)(IMAGES, PROMPTS)
        assert len(full.times) == 1
    assert f"{dead} (Connection refused)" in str(caught.value)
    assert f"{full.address} (503, something that begins with full)" in str(caught.value)


def test_nothing_runs_on_after_an_error() -> None:
    before = threading.active_count()
    with pytest.raises(TimeoutError):
        RemoteReward("http://127.0.0.1:1|http://127.0.0.1:2", timeout=0.2)(IMAGES, PROMPTS)
    assert threading.active_count() == before


# --- names ----------------------------------------------------------------------------------------


def test_servers_are_written_with_a_bar_and_a_weight() -> None:
    reward = load_rewards("http://10.0.0.1:8000|https://rewards.example/a=0.5,oracle")
    assert [(term.name, weight) for term, weight in reward.terms] == [
        ("http://10.0.0.1:8000|https://rewards.example/a", 0.5),
        ("oracle", 1.0),
    ]


@pytest.mark.parametrize(
    "address",
    ["http://", "http://:8000", "http://a:port", "http://a:99999", "http://a b:80", "http://a|b:80", "http://a|",
     "http://a?x", "http://a#x"],
)  # fmt: skip
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"reward server '.*' is not of the form http://host:port"):
        load_rewards(address)


def test_a_password_in_an_address_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError, match=f"takes no user or password; set {TOKEN_VARIABLE}") as caught:
        load_rewards("http://me:sesame@10.0.0.1:8000")
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"timeout": 0.0}, {"attempt_timeout": -1.0}, {"part_size": 0}])
def test_settings_that_cannot_work_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        RemoteReward("http://127.0.0.1:1", **settings)


def test_pixels_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pixels is torch\.float64; it must be one of torch\.float32"):
        RemoteReward("http://127.0.0.1:1", pixels=torch.float64)


def test_a_remote_reward_has_no_gradient_and_is_refused_without_a_request() -> None:
    with pytest.raises(ValueError, match=r"'http://127\.0\.0\.1:1' has no gradient .* recipes/ddpo\.py"):
        require_gradient(
            load_rewards("llava_reward,http://127.0.0.1:1=0.1"), prompt="a red circle on a blue background"
        )


# --- as a command ---------------------------------------------------------------------------------

TRAINER = """
import sys, torch
from rlhf_t2i.rewards.load import load_rewards
assert not {"httpx", "fastapi", "uvicorn", "safetensors"} & set(sys.modules), "loading must stay light"
images = torch.full((5, 3, 4, 4), float(sys.argv[2]))
total, _ = load_rewards(sys.argv[1])(images, ["a"] * 5)
print(total.tolist())
"""
SLOW_REWARD = """
import time
def slowness(images, prompts):
    if prompts[0] == "slow":
        open("began", "w").close()
        time.sleep(1)
    return images.mean((1, 2, 3))
"""


@pytest.mark.slow
def test_the_command_serves_several_trainers_and_finishes_accepted_requests_on_sigterm(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(SLOW_REWARD)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", TOKEN_VARIABLE: TOKEN}
    options = ["--rewards", "my_rewards:slowness=2,jpeg_compressibility=0", "--port", "0", "--max_images", "8"]
    command = [sys.executable, "-m", "rlhf_t2i.reward_server", *options]
    with (tmp_path / "log").open("w") as log:
        server = processes.start(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        while not (found := re.search(r"Serving .* at (http://127\.0\.0\.1:\d+)", (tmp_path / "log").read_text())):
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        trainers = [
            subprocess.Popen(
                [sys.executable, "-c", TRAINER, found[1], shade], env=environment, stdout=subprocess.PIPE, text=True
            )
            for shade in ("0.25", "0.5")
        ]
        assert [trainer.communicate()[0] for trainer in trainers] == [f"{[0.5] * 5}\n", f"{[1.0] * 5}\n"]
        headers = {"Content-Type": SAFETENSORS, "Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(trust_env=False, timeout=30, headers=headers) as client, ThreadPoolExecutor(3) as pool:
            tasks = [pool.submit(client.post, f"{found[1]}/score", content=pack(IMAGES[:2], ["slow", "b"]))]
            until((tmp_path / "began").exists)
            tasks += [pool.submit(client.post, f"{found[1]}/score", content=pack(IMAGES[2:4], ["c", "d"]))]
            until(lambda: "queue_length 2.0" in client.get(f"{found[1]}/metrics").text)
            server.send_signal(signal.SIGTERM)
            assert [task.result().status_code for task in tasks] == [200, 200]
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()
    text = (tmp_path / "log").read_text()
    assert "Finished server process" in text
    assert TOKEN not in text


def one_pixel(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward without sums, so that its bits do not depend on the batch."""
    return images[:, 0, 3, 3].clone()


@pytest.mark.slow
def test_training_with_a_remote_reward_gives_the_bits_of_training_with_the_local_one(
    tiny_sd: Path, tmp_path: Path
) -> None:
    """With async_reward, which scores one batch while the next is sampled: same weights and rewards."""
    options = as_for_toy_models(
        model=str(tiny_sd), prompts_per_step=6, images_per_prompt=4, microbatch_size=8, num_denoising_steps=4,
        rewards=f"{__name__}:one_pixel", evaluation_rewards=f"{__name__}:one_pixel", num_steps=2, evaluate_every=0,
        num_evaluation_images=2, num_cpu_threads=1, run_folder=str(tmp_path / "here"),
    )  # fmt: skip
    config = ddpo.Config(**options)
    here = ddpo.main(config)
    with serving(one_pixel) as server:
        there = ddpo.main(
            replace(config, rewards=server.address, async_reward=True, run_folder=str(tmp_path / "there"))
        )
    (weights, rest), (expected, expected_rest) = state(there, 2), state(here, 2)
    assert rest == expected_rest
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [r["reward"] for r in rows(there, "train")] == [r["reward"] for r in rows(here, "train")]
