"""A multimodal LLM behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a commercial one) as a reward."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from reward_model.text_files import parse_json
from rlhf_t2i.rewards.answers import Answer, fetch, printable, run
from rlhf_t2i.rewards.pixels import to_uint8
from rlhf_t2i.rewards.placement import path_and_arguments
from rlhf_t2i.rewards.remote import address
from rlhf_t2i.rewards.vlm_template import YES_NO, BadAnswerError, VlmTemplate, read_template

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the key of the server."""
MAX_BAD_ANSWERS = 3
"""Answers without a score to one image, after which there is an error."""
_RETRY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_MAX_BACKOFF_SECONDS = 15.0
_JITTER = random.Random()  # apart from the global generator, whose numbers must not change


class _Unavailable(Exception):  # noqa: N818
    """A server that may answer later."""

    def __init__(self, reason: str, *, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class VlmReward:
    """The score that a template makes of a VLM's answer, in [0, 1]; without a gradient.

    Images are sent as PNG, several at once. A server that is busy, broken or restarting is asked again until the time
    of the template is over, and so is an answer without a score, up to three times. What fails then is an error: no
    failure becomes a score.
    """

    def __init__(self, url: str, template: VlmTemplate = YES_NO, *, first_wait: float = 0.2) -> None:
        """Take the URL of the API, which ends with /v1; no request is sent yet.

        `first_wait`: seconds before the second attempt, doubled for each further one. Raises ValueError for a
        malformed URL.
        """
        self.url, self.template, self.first_wait = address(url, key=KEY_VARIABLE), template, first_wait
        self.required_fields = template.fields
        self._model = template.model
        self._certificates = ssl.create_default_context()

    def __call__(
        self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str], metadata: list[dict[str, Any]]
    ) -> Float[Tensor, " B"]:
        """Return one score per image.

        Raises TimeoutError if the server gave no answer in time, PermissionError for a wrong key, and RuntimeError for
        a request that it refuses and for answers without a score; each names the server and the prompt.
        """
        rows = [{**row, "prompt": prompt} for row, prompt in zip(metadata, prompts, strict=True)]
        return run(self._score(to_uint8(images), rows))

    async def _score(self, pixels: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        free, deadline = asyncio.Semaphore(self.template.concurrency), time.monotonic() + self.template.timeout
        # Without trust_env no proxy of the environment is used.
        client = httpx.AsyncClient(timeout=None, trust_env=False, verify=self._certificates, headers=_headers())

        async def work(image: np.ndarray, row: Mapping[str, Any]) -> float:
            async with free:
                return await self._ask(client, image, row, deadline=deadline)

        try:
            async with client, asyncio.TaskGroup() as group:
                if self._model is None and len(rows):
                    self._model = await self._first_model(client, rows[0], deadline=deadline)
                tasks = [group.create_task(work(image, row)) for image, row in zip(pixels, rows, strict=True)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return torch.tensor([task.result() for task in tasks], dtype=torch.float32)

    async def _ask(
        self, client: httpx.AsyncClient, image: np.ndarray, row: Mapping[str, Any], *, deadline: float
    ) -> float:
        content = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}},
            {"type": "text", "text": self.template.ask(row)},
        ]
        body = {"model": self._model, "messages": [{"role": "user", "content": content}], **self.template.options()}
        bad = 0
        while True:
            answer = await self._json(client, "POST", "/chat/completions", row, body=body, deadline=deadline)
            try:
                return self.template.score(answer)
            except BadAnswerError as error:
                bad += 1
                if bad == MAX_BAD_ANSWERS:
                    raise RuntimeError(
                        f"The VLM at {self.url} gave {bad} answers without a score for the prompt {row['prompt']!r}; "
                        f"the last has {error}."
                    ) from None

    async def _first_model(self, client: httpx.AsyncClient, row: Mapping[str, Any], *, deadline: float) -> str:
        listed = await self._json(client, "GET", "/models", row, body=None, deadline=deadline)
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise RuntimeError(
                f"The VLM server {self.url} lists no model; name one as `model` in a template."
            ) from None

    async def _json(
        self, client: httpx.AsyncClient, method: str, path: str, row: Mapping[str, Any], *, body: Any, deadline: float
    ) -> Any:
        """Return the JSON of a response, after as many attempts as there is time for."""
        wait = self.first_wait
        while True:
            try:
                async with asyncio.timeout(min(self.template.attempt_timeout, max(deadline - time.monotonic(), 0.0))):
                    return _parsed(await fetch(client, method, f"{self.url}{path}", json=body), self.url)
            except TimeoutError:
                reason, retry_after = "no response in time", 0.0
            except _Unavailable as error:
                reason, retry_after = str(error), error.retry_after
            except ValueError as error:
                raise RuntimeError(f"The VLM server {self.url} {error}.") from None
            except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
                reason, retry_after = str(error) or type(error).__name__, 0.0
            pause = max(wait * _JITTER.uniform(1, 1.5), retry_after)
            if time.monotonic() + pause >= deadline:
                raise TimeoutError(
                    f"The VLM at {self.url} gave no answer for the prompt {row['prompt']!r} within "
                    f"{self.template.timeout:g} s: {reason}."
                )
            await asyncio.sleep(pause)
            wait = min(2 * wait, _MAX_BACKOFF_SECONDS)


def load_vlm(argument: str) -> VlmReward:
    """Return the reward of URL or URL(template="judge.yaml").

    Raises FileNotFoundError or ValueError for a template that cannot be used, and ValueError for other arguments.
    """
    url, named = path_and_arguments(argument)
    template = named.pop("template", None)
    if named or not isinstance(template, str | None):
        raise ValueError(f"The reward 'vlm:{argument}' takes one argument, as in vlm:{url}(template='judge.yaml').")
    return VlmReward(url, YES_NO if template is None else read_template(template))


def _parsed(response: Answer, url: str) -> Any:
    """Return the JSON of a response; raises _Unavailable if another attempt may succeed."""
    if response.status_code in _RETRY_STATUSES:
        wait = response.headers.get("Retry-After", "")
        seconds = float(wait) if wait.isdecimal() and len(wait) < 6 else 0.0
        raise _Unavailable(f"{response.status_code}, {_shown(response)}", retry_after=seconds)
    if response.status_code in (401, 403):
        problem = "is not accepted" if os.environ.get(KEY_VARIABLE) else "is not set, but the server requires a key"
        raise PermissionError(
            f"The VLM server {url} returned {response.status_code}: the environment variable {KEY_VARIABLE} {problem}."
        )
    if response.status_code != 200:
        raise RuntimeError(f"The VLM server {url} refused a request with {response.status_code}: {_shown(response)}")
    try:
        return parse_json(response.text)
    except ValueError:
        raise _Unavailable(f"no JSON, but {_shown(response)}") from None


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


def _shown(response: Answer) -> str:
    """Return the beginning of a response in one line of printable characters; a key that it echoes is masked."""
    text = printable(response.text.replace(os.environ.get(KEY_VARIABLE, "").strip() or "\0", "***"))[:300]
    return text or "an empty body"


def _data_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
