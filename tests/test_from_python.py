"""Training from Python: `train` of each algorithm with a pipeline, prompts and a reward of the caller's."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

import rlhf_t2i
from rlhf_t2i import ddpo, diffusion_dpo, draft
from rlhf_t2i.output.run_folder import read_captions, read_config
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.training.from_python import PROMPTS
from tests.runs import REDNESS, lora_weights, redness, state, unet_weights

FOXES = ["a fox", "a red fox", "a small fox"]
SMALL: dict[str, Any] = {
    "prompts_per_step": 2, "num_denoising_steps": 2, "num_evaluation_steps": 2, "guidance_scale": 1.0, "num_steps": 2,
    "evaluate_every": 0, "num_evaluation_images": 2, "num_cpu_threads": 1, "learning_rate": 1e-2,
}  # fmt: skip


def pipeline_of(folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def greenness(factor: float) -> Any:
    """A reward that cannot be imported, and returns a list."""

    def green(images: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        return [factor * image[1].mean() for image in images]

    return green


def renamed(function: Any, name: str) -> Any:
    function.__name__ = name
    return function


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    return {**SMALL, "run_folder": str(tmp_path / "run")}


def test_a_given_pipeline_is_trained_in_place_on_given_prompts_with_a_given_function(
    tiny_sd: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = pipeline_of(tiny_sd)
    config = ddpo.Config(**small, images_per_prompt=2, lora_rank=2, ema_decay=0.5)
    result = ddpo.train(config, pipeline=pipeline, prompts=FOXES, reward=greenness(2))
    assert result.pipeline is pipeline
    assert [row["step"] for row in result.metrics] == [1, 2]
    assert [row["step"] for row in result.evaluations] == [0, 2]
    assert all("green" in row for row in result.evaluations)
    trained = {name: weight for name, weight in pipeline.unet.named_parameters() if "lora" in name}
    exported = lora_weights(result.folder)
    assert len(trained) == len(exported)
    for name, weight in trained.items():
        assert torch.equal(weight, exported[f"unet.{name.replace('.default', '')}"])
        assert not weight.requires_grad
    assert "prompts   2 prompts to train on, 1 held back for evaluation" in capsys.readouterr().out
    recorded = read_config(result.folder)
    assert (recorded["model"], recorded["prompts"], recorded["rewards"]) == (str(tiny_sd), PROMPTS, "green")
    assert recorded["lora_rank"] == 2
    pipeline("a fox", num_inference_steps=2, output_type="pt")


def test_all_weights_of_a_pipeline_that_was_never_saved_are_those_of_the_export(
    tiny_sd: Path, small: dict[str, Any]
) -> None:
    pipeline = StableDiffusionPipeline(**pipeline_of(tiny_sd).components, requires_safety_checker=False)
    before = pipeline.unet.conv_in.weight.detach().clone()
    config = draft.Config(**small, lora_rank=None, backprop_steps=1)
    result = draft.train(config, pipeline=pipeline, prompts=FOXES, reward=greenness(1))
    assert read_config(result.folder)["model"] == "StableDiffusionPipeline"
    assert not torch.equal(pipeline.unet.conv_in.weight, before)
    assert torch.equal(pipeline.unet.conv_in.weight, unet_weights(result.folder)["conv_in.weight"])


def test_without_a_pipeline_the_configs_model_is_loaded_and_names_of_rewards_work(
    tiny_sd: Path, small: dict[str, Any]
) -> None:
    config = diffusion_dpo.Config(**small, model=str(tiny_sd), images_per_prompt=2)
    result = diffusion_dpo.train(config, prompts=FOXES, reward=f"{REDNESS}=2")
    assert type(result.pipeline) is StableDiffusionPipeline
    assert REDNESS in result.evaluations[0]
    assert result.report.is_file()


def test_a_sum_and_a_function_that_can_be_imported_have_the_names_of_the_command_line(
    tiny_sd: Path, small: dict[str, Any]
) -> None:
    from rlhf_t2i.training.from_python import _named

    names, objects = _named(None, FOXES, redness)
    assert names["rewards"] == "tests.runs:redness"
    reward = load_rewards("jpeg_compressibility=0.1,tests.runs:redness")
    names, objects = _named(None, FOXES, reward)
    assert names["rewards"] == "jpeg_compressibility=0.1,tests.runs:redness=1.0"
    assert objects.rewards["jpeg_compressibility"] is reward.rewards[0]


def test_a_result_is_shown_in_one_short_line(tiny_sd: Path, small: dict[str, Any]) -> None:
    config = ddpo.Config(**small, images_per_prompt=2)
    result = ddpo.train(config, pipeline=str(tiny_sd), prompts=FOXES, reward=greenness(1))
    assert repr(result).startswith("TrainingResult(2 steps, green 0.")
    assert repr(result).endswith(f"StableDiffusionPipeline, {small['run_folder']})")
    assert len(repr(result)) < 150 + len(small["run_folder"])


def test_ctrl_c_leaves_the_averaged_weights_and_the_run_goes_on_with_the_same_prompts_and_reward_only(
    tiny_sd: Path, small: dict[str, Any]
) -> None:
    calls: list[int] = []

    def green(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(len(images))
        if len(calls) == 3:  # after the trial and the first evaluation
            signal.raise_signal(signal.SIGINT)
        return images[:, 1].mean((1, 2))

    config = ddpo.Config(**small, images_per_prompt=2, ema_decay=0.5, lora_rank=2)
    stopped = ddpo.train(config, pipeline=(pipeline := pipeline_of(tiny_sd)), prompts=FOXES, reward=green)
    assert not stopped.is_complete
    assert repr(stopped).startswith("TrainingResult(stopped after 1 step, green 0.")
    averages = {n.removeprefix("ema/"): t for n, t in state(stopped.folder, 1)[0].items() if n.startswith("ema/")}
    weights = dict(pipeline.unet.named_parameters())
    assert averages
    assert all(torch.equal(weights[name], average) for name, average in averages.items())

    again = config.with_options(resume=True)
    rows = [{"prompt": fox, "text": "FOX"} for fox in FOXES]
    for changed in ({"prompts": [*FOXES, "a hen"]}, {"prompts": rows}, {"reward": renamed(greenness(1), "green")}):
        with pytest.raises(ValueError, match=f"began with other content of .*{next(iter(changed))[:6]}.*; resume it"):
            ddpo.train(again, **{"pipeline": pipeline_of(tiny_sd), "prompts": FOXES, "reward": green, **changed})
    result = ddpo.train(again, pipeline=pipeline_of(tiny_sd), prompts=FOXES, reward=green)
    assert result.is_complete
    assert [row["step"] for row in result.metrics] == [1, 2]


def test_a_training_that_fails_leaves_the_pipeline_as_it_was_and_its_folder_free(
    tiny_sd: Path, small: dict[str, Any]
) -> None:
    pipeline, handler = pipeline_of(tiny_sd).to(torch.bfloat16), signal.getsignal(signal.SIGINT)
    before = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}

    def fails(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if torch.is_grad_enabled() or len(images) == 4:  # not in the trial and the evaluation
            raise ZeroDivisionError("a bug of the reward")
        return images.mean((1, 2, 3))

    config = ddpo.Config(**small, images_per_prompt=2, lora_rank=2)
    with pytest.raises(ZeroDivisionError, match="a bug of the reward"):
        ddpo.train(config, pipeline=pipeline, prompts=FOXES, reward=fails)
    after = pipeline.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(
        after[name].dtype == weight.dtype and torch.equal(after[name], weight) for name, weight in before.items()
    )
    assert signal.getsignal(signal.SIGINT) is handler
    pipeline("a fox", num_inference_steps=2, output_type="pt")

    changed = config.with_options(resume=True, num_steps=1)
    with pytest.raises(ZeroDivisionError, match="a bug of the reward"):
        ddpo.train(changed, pipeline=pipeline, prompts=FOXES, reward=fails)


def test_a_run_that_was_trained_on_a_single_prompt_is_evaluated_on_it(tiny_sd: Path, small: dict[str, Any]) -> None:
    from recipes.evaluate_policy import Config, main

    config = ddpo.Config(**small | {"num_steps": 1, "prompts_per_step": 1}, images_per_prompt=2)
    result = ddpo.train(config, pipeline=str(tiny_sd), prompts=["a fox"], reward=redness)
    settings = Config(weights=str(result.folder), num_evaluation_images=2, run_folder=f"{result.folder}-evaluated")
    row = main(settings)[str(result.folder)]
    assert row[REDNESS] == pytest.approx(result.evaluations[-1][REDNESS], abs=1e-5)
    assert read_captions(Path(f"{result.folder}-evaluated"))["prompts"] == ["a fox", "a fox"]


@pytest.mark.parametrize("name", ["ddpo", "diffusion_dpo", "diffusion_nft", "draft", "flow_grpo"])
def test_each_algorithm_has_a_config_and_a_documented_train(name: str) -> None:
    recipe = getattr(rlhf_t2i, name)
    assert list(inspect.signature(recipe.train).parameters) == ["config", "pipeline", "prompts", "reward"]
    assert recipe.train.__doc__.startswith("Train a diffusion model in this process")
    assert recipe.Config.__doc__


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": "a fox"}, r"prompts is 'a fox'; it must be a list of texts or rows, such as \['a fox'\]"),
        ({"prompts": []}, r"prompts is \[\]; it must be a list of texts or rows"),
        ({"prompts": ["a fox", " "]}, r"prompt 1 is ' '; it must be a text"),
        (
            {"pipeline": torch.nn.Linear(1, 1)},
            "pipeline is a Linear; it must be a diffusers pipeline, or the folder or",
        ),
        ({"pipeline": "a/b"}, r"a/b is not a built-in one, so prompts and rewards must be given to train, as in train"),
        ({"pipeline": "a/b", "prompts": FOXES}, r"so rewards must be given to train, as in .*, reward=my_reward\)"),
        ({"prompts": FOXES, "reward": dict}, r"'dict' is a class; give an instance of it"),
        ({"prompts": FOXES, "reward": lambda images: images}, "cannot be called with"),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, Any], message: str, small: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        ddpo.train(ddpo.Config(**small), **given)
    assert not Path(small["run_folder"]).exists()


def test_a_pipeline_that_has_a_lora_is_refused_with_what_to_do(tiny_sd: Path, small: dict[str, Any]) -> None:
    pipeline = pipeline_of(tiny_sd)
    config = ddpo.Config(**small, images_per_prompt=2, lora_rank=2)
    ddpo.train(config, pipeline=pipeline, prompts=FOXES, reward=redness)
    again = config.with_options(run_folder=f"{small['run_folder']}-again")
    with pytest.raises(ValueError, match=r"keep it by pipeline.fuse_lora\(\) and then pipeline.unload_lora_weights"):
        ddpo.train(again, pipeline=pipeline, prompts=FOXES, reward=redness)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    again = again.with_options(mixed_precision="bf16")
    ddpo.train(again, pipeline=pipeline, prompts=FOXES, reward=redness)
    assert {part.dtype for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae)} == {torch.float32}
    pipeline("a fox", num_inference_steps=2, output_type="pt")


def test_several_processes_are_for_the_launcher(monkeypatch: pytest.MonkeyPatch, small: dict[str, Any]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start the recipe by accelerate launch"):
        ddpo.train(ddpo.Config(**small), prompts=FOXES, reward=redness)


def test_a_wrong_reward_is_refused_before_the_run_folder_is_made(tiny_sd: Path, small: dict[str, Any]) -> None:
    def tuple_of(images: Tensor, prompts: Sequence[str]) -> Any:
        return images.mean((1, 2, 3)), {}

    with pytest.raises(TypeError, match="'tuple_of' returned a tuple"):
        ddpo.train(ddpo.Config(**small), pipeline=pipeline_of(tiny_sd), prompts=FOXES, reward=tuple_of)
    assert not Path(small["run_folder"]).exists()
