"""Training that starts from a LoRA or a denoiser that exists."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from recipes import ddpo, diffusion_dpo
from rlhf_t2i.models.lora import LoraConfiguration
from rlhf_t2i.models.packaging import save_trained_pipeline
from rlhf_t2i.models.warm_start import start_from_lora, start_from_weights
from tests.policies import LATEST, images_of, perturb, pipeline_of, policy_of, stock_images
from tests.runs import REDNESS, assert_same, lora_weights, rows, state
from tests.trained_weights import denoiser_of, describe_run, in_kohyas_layout, lora_of


def start(policy: object, source: Path, model: Path, *, keep_start: bool = True, **given: object) -> tuple[int, float]:
    options = {"rank": None, "alpha": None, **given}
    return start_from_lora(policy, source, model=str(model), keep_start=keep_start, **options)  # type: ignore[arg-type]


# --- a LoRA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "name"),
    [("run", "tiny_sd"), ("folder", "tiny_sd3"), ("file", "tiny_sdxl"), ("kohya", "tiny_sd"), ("kohya", "tiny_sdxl"),
     *(pytest.param("run", name, marks=pytest.mark.slow) for name in LATEST)],
)  # fmt: skip
def test_training_goes_on_with_a_lora_and_exports_an_ordinary_one_of_the_base(
    layout: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(name)
    file = lora_of(model, tmp_path, rank=4, alpha=6.0)
    source = {"run": tmp_path, "folder": file.parent, "file": file, "kohya": tmp_path / "kohya.safetensors"}[layout]
    if layout == "kohya":
        in_kohyas_layout(file, source, alphas=[6.0])
    policy = policy_of(model)
    assert start(policy, source, model) == (4, 6.0)
    assert_close(images_of(policy), images_of(policy_of(model, weights=source)), rtol=0, atol=1e-6)
    assert {name.rsplit(".lora_", 1)[1] for name in policy.trainable} == {"A.default.weight", "B.default.weight"}
    perturb(policy)
    exported = policy.export(tmp_path / "next", policy.trainable)
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(exported)
    assert_close(stock_images(pipeline), images_of(policy), rtol=0, atol=2e-5)


def test_a_lora_goes_on_in_float32_on_a_denoiser_in_bfloat16(tiny_sd: Path, tmp_path: Path) -> None:
    file = lora_of(tiny_sd, tmp_path)
    policy = policy_of(tiny_sd, torch.bfloat16)
    start(policy, file, tiny_sd)
    assert policy.network.conv_in.weight.dtype == torch.bfloat16
    policy.export(tmp_path / "next", policy.trainable)
    assert_same(lora_weights(tmp_path / "next"), load_file(file))


@pytest.mark.parametrize("keep_start", [True, False])
def test_the_reference_is_the_lora_at_the_start_or_the_base(keep_start: bool, tiny_sd: Path, tmp_path: Path) -> None:
    file = lora_of(tiny_sd, tmp_path)
    policy = policy_of(tiny_sd)
    base = images_of(policy)
    start(policy, file, tiny_sd, keep_start=keep_start)
    at_start, trained = images_of(policy), list(policy.trainable)
    perturb(policy)
    after = images_of(policy)
    with torch.no_grad(), policy.as_reference():
        assert_close(images_of(policy), at_start if keep_start else base, rtol=0, atol=0)
    assert_close(images_of(policy), after, rtol=0, atol=0)
    assert (after - at_start).abs().max() > 1e-3
    assert (at_start - base).abs().max() > 1e-3
    assert list(policy.trainable) == trained


def test_a_rank_or_alpha_that_contradicts_the_lora_is_an_error(tiny_sd: Path, tmp_path: Path) -> None:
    file = lora_of(tiny_sd, tmp_path, rank=4, alpha=6.0)
    with pytest.raises(ValueError, match=r"lora_rank is 8, but the LoRA .* has 4; leave lora_rank out"):
        start(policy_of(tiny_sd), file, tiny_sd, rank=8)
    with pytest.raises(ValueError, match=r"lora_alpha is 4\.0, but the LoRA .* has 6\.0; leave lora_alpha out"):
        start(policy_of(tiny_sd), file, tiny_sd, alpha=4.0)
    assert start(policy_of(tiny_sd), file, tiny_sd, rank=4, alpha=6.0) == (4, 6.0)


def test_a_lora_that_cannot_go_on_is_refused(tiny_sd: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no LoRA"):
        start(policy_of(tiny_sd), tmp_path, tiny_sd)
    file = lora_of(tiny_sd, tmp_path)
    with pytest.raises(ValueError, match="does not fit the model"):
        start(policy_of(tiny_sd3), file, tiny_sd3)
    describe_run(tmp_path, model=str(tiny_sd))
    with pytest.raises(ValueError, match="trained the model"):
        start(policy_of(tiny_sd3), tmp_path, tiny_sd3)
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight"
    save_file({**load_file(file), name: torch.zeros(2, 16)}, file)
    with pytest.raises(ValueError, match="has weights of text_encoder, which training leaves alone"):
        start(policy_of(tiny_sd), file, tiny_sd)


# --- a full denoiser ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.parametrize("keep_base", [True, False])
def test_training_starts_from_a_denoiser_and_is_compared_with_it_or_with_the_base(
    keep_base: bool, lora_rank: int | None, tiny_sd: Path, tmp_path: Path
) -> None:
    folder = denoiser_of(tiny_sd, tmp_path)
    policy = policy_of(tiny_sd)
    base, expected = images_of(policy), images_of(policy_of(tiny_sd, weights=folder))
    start_from_weights(policy, tmp_path, model=str(tiny_sd), keep_base=keep_base)
    policy.set_trainable(LoraConfiguration(lora_rank) if lora_rank else None, keep_reference=True, seed=0)
    assert_close(images_of(policy), expected, rtol=0, atol=0)
    perturb(policy)
    with torch.no_grad(), policy.as_reference():
        assert_close(images_of(policy), base if keep_base else expected, rtol=0, atol=0)
    assert (images_of(policy) - expected).abs().max() > 1e-3


def test_a_folder_without_a_denoiser_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    lora_of(tiny_sd, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no full denoiser\. Give a run folder that has 'unet'"):
        start_from_weights(policy_of(tiny_sd), tmp_path, model=str(tiny_sd), keep_base=False)


# --- runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny_sd: Path, tmp_path: Path) -> ddpo.Config:
    """Two steps with a KL penalty."""
    return ddpo.Config(
        model=str(tiny_sd), prompts_per_step=2, images_per_prompt=2, num_denoising_steps=2, num_minibatches=1,
        window_end=1.0, learning_rate=1e-2, kl_weight=0.1, rewards=REDNESS, evaluation_rewards=REDNESS, num_steps=2,
        evaluate_every=0, num_evaluation_images=4, num_evaluation_steps=2, checkpoint_every=1, keep_checkpoints=3,
        num_cpu_threads=1, prompts="shapes", evaluation_prompts="shapes", microbatch_size=8, guidance_scale=1.0,
        resolution=16, run_folder=str(tmp_path / "run"),
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_from_a_lora_starts_where_it_is_and_resumes_exactly_without_it(
    config: ddpo.Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = ddpo.main(replace(config, lora_rank=2, run_folder=str(tmp_path / "first")))
    config = replace(config, lora_rank=None, init_lora=str(first))
    whole = ddpo.main(config)
    assert rows(whole, "evaluation")[0][REDNESS] == rows(first, "evaluation")[-1][REDNESS]
    assert rows(whole, "train")[0]["kl"] == 0  # against the start
    assert f"reference {config.model}, started from {first}" in capfd.readouterr().out
    stopped = replace(config, run_folder=str(tmp_path / "stopped"), num_steps=1)
    ddpo.main(stopped)
    shutil.rmtree(first)
    resumed = ddpo.main(replace(stopped, num_steps=2, resume=True))
    assert_same(state(resumed, 2)[0], state(whole, 2)[0])
    at_the_end = images_of(policy_of(Path(config.model), weights=whole))
    assert_close(images_of(policy_of(Path(config.model), weights=whole / "checkpoints" / "step_000002")), at_the_end)


def test_a_run_from_a_lora_can_be_compared_with_the_base(
    config: ddpo.Config, tiny_sd: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lora = lora_of(tiny_sd, tmp_path)
    folder = ddpo.main(config.with_options(init_lora=str(lora), reference_model="base", num_steps=1))
    assert rows(folder, "train")[0]["kl"] > 0
    assert f"reference {config.model}\n" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 2])
def test_weights_of_a_run_from_a_denoiser_are_loaded_with_it(
    lora_rank: int | None, config: ddpo.Config, tiny_sd: Path, tmp_path: Path
) -> None:
    source = denoiser_of(tiny_sd, tmp_path / "source")
    folder = ddpo.main(replace(config, init_weights=str(source), lora_rank=lora_rank, num_steps=1))
    trained = policy_of(tiny_sd)
    start_from_weights(trained, source, model=str(tiny_sd), keep_base=False)
    trained.set_trainable(LoraConfiguration(lora_rank) if lora_rank else None, keep_reference=False, seed=0)
    weights = {name.removeprefix("weight/"): w for name, w in state(folder, 1)[0].items() if name.startswith("weight/")}
    trained.network.load_state_dict(weights, strict=False)
    places = [folder, folder / ("lora" if lora_rank else "unet"), folder / "checkpoints" / "step_000001"]
    for place in places:
        assert_close(images_of(policy_of(tiny_sd, weights=place)), images_of(trained), rtol=0, atol=1e-6)
    save_trained_pipeline(str(tiny_sd), places[1], tmp_path / "published")
    assert_close(stock_images(pipeline_of(tmp_path / "published")), images_of(trained), rtol=0, atol=2e-5)


def test_every_recipe_that_trains_starts_from_a_lora(config: ddpo.Config, tiny_sd: Path, tmp_path: Path) -> None:
    """Here Diffusion-DPO: at the start every pair is as likely as by the reference, so the loss is log 2."""
    lora = lora_of(tiny_sd, tmp_path)
    shared = {name: getattr(config, name) for name in ("model", "rewards", "evaluation_rewards", "prompts")}
    folder = diffusion_dpo.main(
        diffusion_dpo.Config(
            **shared, init_lora=str(lora), evaluation_prompts="shapes", prompts_per_step=2, images_per_prompt=2,
            num_denoising_steps=2, num_inner_epochs=1, num_steps=1, evaluate_every=0, num_evaluation_images=2,
            microbatch_size=8, guidance_scale=1.0, num_cpu_threads=1, run_folder=config.run_folder,
        )
    )  # fmt: skip
    assert rows(folder, "train")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_a_lora_of_another_denoiser_needs_that_denoiser_too(tmp_path: Path) -> None:
    import yaml

    from rlhf_t2i.settings import ddpo as settings
    from rlhf_t2i.training.start import _check_denoiser_of

    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"init_weights": "runs/full"}))
    with pytest.raises(ValueError, match="was trained on the denoiser runs/full; give --init_weights runs/full too"):
        _check_denoiser_of(tmp_path / "lora", settings.Config(init_lora=str(tmp_path)))
    _check_denoiser_of(tmp_path / "lora", settings.Config(init_lora=str(tmp_path), init_weights="runs/full"))
