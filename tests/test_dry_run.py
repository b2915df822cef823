"""`--dry_run`: what a plan says of a step equals what is counted when the same step runs on real tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes import ddpo, diffusion_dpo, diffusion_nft, draft, fk_steering, flow_grpo
from rlhf_t2i.plan.dry_run import rehearse, rehearsed
from tests.runs import REDNESS

SMALL = {
    "prompts_per_step": 2, "images_per_prompt": 4, "num_denoising_steps": 4, "num_steps": 7, "microbatch_size": 2,
    "num_cpu_threads": 1, "lora_rank": 4, "gradient_checkpointing": False, "rewards": REDNESS,
    "evaluation_rewards": REDNESS,
}  # fmt: skip


def config_of(recipe: Any, model: Path, tmp_path: Path, **options: Any) -> Any:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\na pear\na bell\n")
    known = {name: value for name, value in SMALL.items() if name in recipe.Config.__dataclass_fields__}
    files = {"model": str(model), "prompts": str(prompts), "evaluation_prompts": str(prompts)}
    return recipe.Config(
        **known | {n: v for n, v in files.items() if n in recipe.Config.__dataclass_fields__} | options
    )


CASES = [
    (ddpo, "tiny_sd", {"num_minibatches": 2}),
    (ddpo, "tiny_sd", {"lora_rank": None, "gradient_checkpointing": True, "num_minibatches": 1}),
    (flow_grpo, "tiny_sd3", {"num_minibatches": 1}),
    (diffusion_nft, "tiny_flux", {"resolution": 64}),
    (draft, "tiny_sdxl", {"backprop_steps": 1}),
    (diffusion_dpo, "tiny_sd", {"lora_rank": None, "pairs_per_step": 6, "pairs": "missing.jsonl", "prompts": ""}),
    (fk_steering, "tiny_sd", {"images_per_prompt": 1, "num_particles": 2, "resample_after": "2", "reward_std": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "model", "options"),
    [pytest.param(*case, marks=pytest.mark.slow if i else ()) for i, case in enumerate(CASES)],
    ids=[f"{case[0].__name__}-{case[1]}-{i}" for i, case in enumerate(CASES)],
)
def test_a_plan_counts_what_a_real_step_does(
    recipe: Any, model: str, options: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    config = config_of(recipe, request.getfixturevalue(model), tmp_path, **options)
    plan, real = (rehearse(recipe.main, config, fake=fake, on_gpu=False) for fake in (True, False))
    assert plan.flops == pytest.approx(real.flops)
    assert plan.denoiser_calls == real.denoiser_calls
    assert (plan.images, plan.num_steps, plan.parts) == (real.images, real.num_steps, real.parts)
    assert plan.peak == pytest.approx(real.peak, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "model"), [(ddpo, "tiny_sd"), (diffusion_nft, "tiny_sd3")], ids=["ddpo", "diffusion_nft"]
)
def test_running_repeated_work_once_changes_no_number(
    recipe: Any, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    options = {"prompts_per_step": 1, "images_per_prompt": 3, "num_denoising_steps": 3, "num_minibatches": 1}
    config = config_of(recipe, request.getfixturevalue(model), tmp_path, **options)
    once, all_of_it = (rehearse(recipe.main, config, repeats=repeats) for repeats in (False, True))
    assert (once.flops, once.denoiser_calls) == pytest.approx((all_of_it.flops, all_of_it.denoiser_calls), rel=1e-9)
    # Metrics of microbatches that are left out, and the first microbatch's sum of gradients.
    assert (once.bytes, *once.peaks.values()) == pytest.approx((all_of_it.bytes, *all_of_it.peaks.values()), rel=2e-3)


@pytest.mark.slow
def test_a_plan_holds_the_moments_of_the_optimiser_that_is_chosen(tiny_sd: Path, tmp_path: Path) -> None:
    """Two float32 numbers a trained weight with AdamW, one with SGD, two of 8 bits with adamw_8bit."""
    plans = {
        optimizer: rehearse(ddpo.main, config_of(ddpo, tiny_sd, tmp_path, lora_rank=None, optimizer=optimizer))
        for optimizer in ("adamw", "sgd", "adamw_8bit")
    }
    trained = plans["adamw"].parts["unet"][0]
    sizes = {name: plan.state["optimizer"] / trained for name, plan in plans.items()}
    assert sizes == {"adamw": 8, "sgd": 4, "adamw_8bit": 2}
    sampling = {name: plan.peaks["rollout"] for name, plan in plans.items()}
    assert sampling["adamw"] - sampling["sgd"] == pytest.approx(4 * trained, rel=0.02)
    assert sampling["adamw"] - sampling["adamw_8bit"] == pytest.approx(6 * trained, rel=0.02)


@pytest.mark.slow
def test_one_rehearsal_plans_cached_prompts_and_a_reward_that_is_away(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached prompts are encoded before there is a denoiser, whole or sharded, and need no encoder later."""
    pick_score = "clip:yuvalkirstain/PickScore_v1"
    config = config_of(ddpo, tiny_sd, tmp_path, rewards=pick_score, evaluation_rewards=pick_score)
    plan_of = rehearsed(ddpo.main, config)
    plain, cached = plan_of(config), plan_of(config.with_options(cache_embeddings="embeddings"))
    assert plain == rehearse(ddpo.main, config)
    size = {name: part[2] for name, part in plain.parts.items()}
    trained = plain.state["optimizer"] + plain.state["averages"]
    assert plain.peaks["encode"] - cached.peaks["encode"] == size["unet"] + trained
    assert plain.peaks["update"] - cached.peaks["update"] == size["text_encoder"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    sharded = rehearsed(ddpo.main, config)(config.with_options(cache_embeddings="embeddings"))
    assert sharded.mode == "fsdp2"
    assert sharded.peaks["encode"] == pytest.approx(cached.peaks["encode"], rel=0.1)  # with half of the prompts
    away = f"{pick_score}(offload=True)"
    offloaded = plan_of(config.with_options(rewards=away, evaluation_rewards=away))
    saved = {phase: plain.peaks[phase] - peak for phase, peak in offloaded.peaks.items()}
    assert saved.pop("reward") == 0
    assert set(saved.values()) == {4 * 986_109_441}
