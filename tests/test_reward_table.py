"""Every reward of the table, with tiny models: an image scores the same alone, in a batch and over HTTP."""

from __future__ import annotations

import base64
import io
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.testing import assert_close

from reward_model.scorers import text_reader, unified_reward
from reward_model.scorers.text_reader import load_text_reader
from rlhf_t2i.prompt_rows import Prompt
from rlhf_t2i.rewards import geneval, ocr
from rlhf_t2i.rewards.load import load_reward, load_rewards
from rlhf_t2i.rewards.table import REWARDS
from rlhf_t2i.rewards.trial import try_rewards
from rlhf_t2i.shapes.scenes import parse_prompt, render
from rlhf_t2i.shapes.signs import Sign, render_signs
from tests.geneval_files import LINES, make_geneval_models
from tests.reward_models import backbone_folder, bytes_of, reward_model_folder
from tests.runs import REDNESS
from tests.scorer_files import save_hps_v3, save_scorers
from tests.servers import running, served

TOY = ["a red circle on a blue background", "a green square on a white background"]
FLAT = {"nudity", "geneval", "geneval:graded"}
"""Rewards whose tiny or real detectors find nothing in images of noise."""
SLOW = {"llava_reward", "ocr", "nudity", "geneval", "geneval:graded", "hps_v3:PATH"}
"""Rewards with networks that are not tiny, or many of them."""
EXTRAS = {"nudity": ("nudenet",), "ocr": ("rapidfuzz", "rapidocr"), "ocr:PATH": ("rapidfuzz",)}
PLACES = {
    "llava_reward": lambda: reward_model_folder("llava"),
    "pairwise": lambda: reward_model_folder("llava", head="general_preference"),
    "unified_reward": lambda: backbone_folder("qwen3_vl"),
    "soft_tifa": lambda: backbone_folder("qwen3_vl"),
    "ocr": lambda: backbone_folder("qwen2_5_vl"),
}
"""Where the tiny models are that other tests use too."""


def images_and_prompts(name: str) -> tuple[Tensor, list[str]]:
    """Two images, of which each has what the reward needs."""
    images = torch.stack([bytes_of(64, 64, seed=seed) for seed in range(2)]).float() / 255
    match name:
        case "oracle" | "oracle_pass":
            drawn = render([parse_prompt(TOY[0])] * 2, rng=np.random.default_rng(0))
            return drawn, TOY  # right and wrong
        case "llava_reward":
            return images, TOY
        case "pairwise:PATH":
            return images, ["a red fox"] * 2
        case "soft_tifa:PATH":
            questions = [[["a red fox", "red"]], [["a blue cat", "a"]]]
            return images, [
                Prompt(text, {"prompt": text, "vqa_list": q}) for text, q in zip(TOY, questions, strict=True)
            ]
        case "geneval" | "geneval:graded":
            return images, [Prompt(row["prompt"], row) for row in LINES[:2]]
        case "oracle_word":
            drawn = render_signs([Sign("FOX", "red", "white")] * 2, rng=np.random.default_rng(0))
            return drawn, [Sign(word, "red", "white").prompt for word in ("FOX", "CAB")]
        case "ocr":
            return torch.stack([sign("FOX"), sign("CAB")]), ['a sign that says "FOX"'] * 2
        case "ocr:PATH":
            first, second = load_text_reader(str(backbone_folder("qwen2_5_vl")))(images)
            return images, [f'a sign that says "{first}"', f'a sign that says "{second}{second}"']
        case _:
            return images, ["a red fox", "a blue cat on a red fox"]


def sign(text: str) -> Tensor:
    image = Image.new("RGB", (64, 24), "white")
    ImageDraw.Draw(image).text((4, 2), text, font=ImageFont.load_default(16), fill="black")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def vlm() -> FastAPI:
    """A server whose probability of yes is the mean brightness of the image."""
    app = FastAPI()

    async def answer(request: Request) -> object:
        picture = (await request.json())["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            chance = float(np.asarray(image.convert("L")).mean()) / 255
        top = [{"token": text, "logprob": math.log(p)} for text, p in (("Yes", chance), ("No", 1 - chance))]
        return {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}

    app.add_api_route("/v1/models", lambda: {"data": [{"id": "tiny"}]})
    app.add_api_route("/v1/chat/completions", answer, methods=["POST"], response_model=None)
    return app


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of other projects; that of VQAScore has a token Yes."""
    root = tmp_path_factory.mktemp("rewards")
    save_scorers(root)
    for name in ("clip_score", "pick_score"):
        (root / name).symlink_to(root / "clip")
    save_hps_v3(root / "hps_v3")
    make_geneval_models(root / "geneval")
    shutil.copytree(backbone_folder("llava"), root / "vqa_score")
    (root / "visual_gpt_score").symlink_to(root / "vqa_score")
    tokenizer = root / "vqa_score" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"red"', '"Yes"'))
    return root


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    """Servers that are shut down after the test."""
    with ExitStack() as stack:
        yield stack


def written(name: str, root: Path, servers: ExitStack) -> str:
    """What a user would write for a row of the table."""
    match name:
        case "module:function":
            return REDNESS
        case "http://HOST:PORT":
            return servers.enter_context(served(load_rewards(REDNESS)))
        case "vlm:URL":
            return f"vlm:{servers.enter_context(running(vlm()))}/v1"
        case _:
            kind, _, path = name.partition(":")
            return f"{kind}:{PLACES[kind]() if kind in PLACES else root / kind}" if path == "PATH" else name


@pytest.mark.parametrize(
    "name",
    [pytest.param(e.name, marks=[pytest.mark.slow] if e.name in SLOW else []) for e in REWARDS],
)
def test_an_image_scores_the_same_alone_in_a_batch_and_over_http(
    name: str, root: Path, servers: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone is with its group, for a reward that compares the images of one prompt."""
    if missing := [package for package in EXTRAS.get(name, ()) if find_spec(package) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    monkeypatch.setattr(geneval, "DETECTOR", str(root / "geneval" / "detector"))
    monkeypatch.setattr(geneval, "CLIP", str(root / "geneval" / "clip"))
    monkeypatch.setattr(ocr, "OcrReward", partial(ocr.OcrReward, min_side=96))  # or it takes seconds an image
    monkeypatch.setattr(unified_reward, "MAX_TOKENS", 4)
    monkeypatch.setattr(text_reader, "MAX_TOKENS", 4)
    monkeypatch.setattr(unified_reward, "QUESTION", "{}")
    monkeypatch.setattr(unified_reward, "rating", lambda answer, prompt: sum(map(ord, answer)) % 101 / 100)
    images, prompts = images_and_prompts(name)
    reward = load_reward(written(name, root, servers))
    together = reward(images, prompts)
    size = 2 if reward.needs_groups else 1
    alone = [reward(images[i : i + size], prompts[i : i + size]) for i in range(0, 2, size)]
    assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-6)
    remote = load_rewards(servers.enter_context(served(load_rewards(written(name, root, servers)))))
    try_rewards(remote, prompts)
    assert torch.equal(remote(images, prompts)[0], together)
    assert name in FLAT or together[0] != together[1]
