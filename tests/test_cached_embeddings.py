"""`--cache_embeddings`: encoded prompts that outlive a run, so that text encoders need not be loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from recipes import ddpo
from rlhf_t2i.data.latent_cache import TensorCache
from rlhf_t2i.data.text_cache import StoredPrompts
from rlhf_t2i.models import pipeline_parts
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.lazy_encoders import encode_and_release
from rlhf_t2i.prompt_rows import EditPrompt
from rlhf_t2i.training import setup
from tests.policies import policy_of
from tests.runs import REDNESS, as_for_toy_models, assert_same, weights

PROMPTS = ["a fox", "a red cat", "a fox"]


def store(folder: Path, fingerprint: str) -> StoredPrompts:
    return StoredPrompts(TensorCache(folder, part="text encoder", fingerprint=fingerprint))


def lazy_policy(model: Path, folder: Path, **options: Any) -> DiffusionPolicy:
    return policy_of(model, prompt_store=partial(store, folder), **options)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders of networks whose weights are loaded."""
    names, original = list[str](), pipeline_parts._load_part

    def load_part(kind: Any, folder: Path, dtype: torch.dtype | None) -> nn.Module:
        if dtype is not None:
            names.append(folder.name)
        return original(kind, folder, dtype)

    monkeypatch.setattr(pipeline_parts, "_load_part", load_part)
    return names


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ("tiny_sd3", torch.bfloat16),
        *(
            pytest.param(model, torch.float32, marks=pytest.mark.slow)
            for model in (
                "tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_flux2", "tiny_zimage", "tiny_sana",
                "tiny_qwen_image",
            )
        ),
    ],
)  # fmt: skip
def test_cached_prompts_have_the_bits_of_encoded_ones_and_need_no_text_encoder(
    model: str, dtype: torch.dtype, request: pytest.FixtureRequest, tmp_path: Path, loaded: list[str]
) -> None:
    folder = request.getfixturevalue(model)
    plain = policy_of(folder, dtype=dtype)
    expected = plain.encode(PROMPTS).parts
    first = lazy_policy(folder, tmp_path / "cache", dtype=dtype)
    assert encode_and_release(first, PROMPTS, tick=lambda: None) == 2
    loaded.clear()
    later = lazy_policy(folder, tmp_path / "cache", dtype=dtype)
    assert encode_and_release(later, PROMPTS, tick=lambda: None) == 0
    for policy in (first, later):
        assert_same(policy.encode(PROMPTS).parts, expected)
        assert (policy.unconditional is None) == (plain.unconditional is None)
        if policy.unconditional is not None and plain.unconditional is not None:
            assert_same(policy.unconditional.parts, plain.unconditional.parts)
    assert loaded
    assert not [name for name in loaded if name.startswith("text_encoder")]


def test_a_prompt_that_is_not_cached_loads_the_encoders_once(tiny_sd: Path, tmp_path: Path, loaded: list[str]) -> None:
    encode_and_release(policy := lazy_policy(tiny_sd, tmp_path / "cache"), PROMPTS, tick=lambda: None)
    loaded.clear()
    policy.encode(["a pear"])
    policy.encode(["a bell", "a fox"])
    assert loaded == ["text_encoder"]


def test_the_cache_of_other_encoders_precision_or_tokenizer_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_sd, tmp_path / "model"))
    lazy_policy(model, tmp_path / "cache")
    with pytest.raises(ValueError, match="made with another text encoder"):
        lazy_policy(model, tmp_path / "cache", dtype=torch.bfloat16)
    weights_file = model / "text_encoder" / "model.safetensors"
    weights_file.write_bytes(bytes([*weights_file.read_bytes()[:-1], 1]))
    with pytest.raises(ValueError, match="made with another text encoder"):
        lazy_policy(model, tmp_path / "cache")


def test_a_run_with_cached_prompts_equals_one_without(tiny_sd: Path, tmp_path: Path, loaded: list[str]) -> None:
    options: dict[str, Any] = {
        **as_for_toy_models(), "num_denoising_steps": 2, "microbatch_size": 4, "rewards": REDNESS, "num_steps": 1,
        "evaluation_rewards": REDNESS, "num_evaluation_images": 2, "checkpoint_every": 1, "num_cpu_threads": 1,
        "prompts_per_step": 2, "images_per_prompt": 2,
    }  # fmt: skip
    config = ddpo.Config(**options, model=str(tiny_sd), run_folder=str(tmp_path / "plain"))
    expected = ddpo.main(config)
    cached = replace(config, cache_embeddings=str(tmp_path / "cache"))
    loaded.clear()
    ddpo.main(replace(cached, run_folder=str(tmp_path / "first")))
    assert "text_encoder" in loaded
    assert "text_encoder" not in loaded[loaded.index("unet") :]  # never both in memory
    loaded.clear()
    folder = ddpo.main(replace(cached, run_folder=str(tmp_path / "second")))
    assert_same(weights(folder, 1), weights(expected, 1))
    assert loaded
    assert "text_encoder" not in loaded


@pytest.mark.parametrize(
    ("prompt", "only_encodes"), [("a fox", [True, False]), (EditPrompt("red", Path("a.png")), [False])]
)
def test_prompts_with_an_image_are_encoded_by_the_policy_that_trains(
    prompt: str, only_encodes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not cached on disk, so a policy without denoiser would encode them in vain."""
    calls = list[bool]()

    def load(config: Any, run: Any, *, only_encodes: bool = False) -> object:
        calls.append(only_encodes)
        return object()

    monkeypatch.setattr(setup, "_load", load)
    monkeypatch.setattr(setup, "_encode_prompts", lambda *_: None)
    config, prompts = (
        SimpleNamespace(cache_embeddings="cache"),
        SimpleNamespace(training=[prompt], evaluation=["a cat"]),
    )
    setup._load_with_prompts(config, prompts, None)  # type: ignore[arg-type]
    assert calls == only_encodes
