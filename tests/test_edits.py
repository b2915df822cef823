"""Instructions to edit an image: rows with a reference image, from the file of prompts to training and its rewards."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from recipes import best_of_n, collect_preferences, diffusion_dpo, evaluate_policy, flow_grpo
from reward_model.datasets import BadRecordError, load_records, load_same_prompt_pairs
from reward_model.images import fit, to_tensor
from rlhf_t2i.advantages import PerPromptHistory
from rlhf_t2i.data.image_pairs import ImagePairs, instructions_of
from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.data.saved_pairs import save_pairs
from rlhf_t2i.diffusion.gaussian import mean_log_prob
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.reference_images import check_edits
from rlhf_t2i.prompt_rows import EditPrompt, as_prompts, emptied, key_of, metadata_of
from rlhf_t2i.sampling.rollout import generate, rollout, transition_at
from tests.policies import PROMPTS, pipeline_of, policy_of, sampler_of
from tests.runs import as_for_toy_models, rows
from tests.toys import seeded

MODEL = "Flux2KleinPipeline"
LIKENESS = "tests.test_edits:likeness"


def likeness(images: Tensor, prompts: Sequence[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Minus the mean distance of each image from the one that it edits."""
    sources = torch.stack([fit(to_tensor(row["image"]), *images.shape[2:]) for row in metadata])
    return -(images - sources.to(images)).abs().mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two images, and of a file with one instruction for both."""
    folder = tmp_path_factory.mktemp("edits")
    for name, size in (("a", (16, 16)), ("b", (16, 16)), ("wide", (48, 24))):
        noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(ord(name[0])))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{name}.png")
    lines = [json.dumps({"prompt": PROMPTS[0], "image": f"{name}.png", "id": name}) for name in "ab"]
    (folder / "edits.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def policy(tiny_flux2: Path) -> DiffusionPolicy:
    return policy_of(tiny_flux2)


# --- rows -----------------------------------------------------------------------------------------------


def test_a_row_with_an_image_is_an_instruction_whose_image_starts_from_its_file(folder: Path) -> None:
    first, second = load_prompts(str(folder / "edits.jsonl"))
    assert isinstance(first, EditPrompt)
    assert first.image == folder / "a.png"
    assert metadata_of([second]) == [{"prompt": PROMPTS[0], "image": str(folder / "b.png"), "id": "b"}]
    [given] = as_prompts([{"prompt": PROMPTS[0], "image": str(folder / "a.png")}])
    assert given == first


def test_one_instruction_for_two_images_is_two_prompts(folder: Path) -> None:
    first, second = load_prompts(str(folder / "edits.jsonl"))
    assert str(first) == str(second) == PROMPTS[0]
    assert first != second
    assert (first == PROMPTS[0], PROMPTS[0] == first, first != PROMPTS[0]) == (False, False, True)
    assert len({first, second, copy.deepcopy(first), pickle.loads(pickle.dumps(second)), PROMPTS[0]}) == 3
    assert key_of(emptied(first)) == f"\0{folder / 'a.png'}"
    history = PerPromptHistory(size=2, min_count=2)
    history([first, second], torch.tensor([[0.0, 1.0], [10.0, 12.0]]))
    restored = PerPromptHistory(size=2, min_count=2)
    restored.load_state_dict(history.state_dict())
    rewards = torch.tensor([[0.0, 1.0], [10.0, 12.0]])
    assert_close(restored([first, second], rewards), torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))


@pytest.mark.parametrize(
    ("row", "model", "error", "message"),
    [
        ({"prompt": "a fox"}, MODEL, ValueError, r"f\.jsonl:2 has no 'image' to edit, and .*f\.jsonl:1 has one"),
        ({"prompt": "b", "image": "no.png"}, MODEL, FileNotFoundError, r"f\.jsonl:2: there is no image '.*no\.png'"),
        ({"prompt": "b", "image": "f.jsonl"}, MODEL, ValueError, r"f\.jsonl:2: '.*f\.jsonl' is no image that can be"),
        (
            {"prompt": "b", "image": ["a.png"]},
            MODEL,
            ValueError,
            r"f\.jsonl:2 has the 'image' \['a\.png'\]; it must be",
        ),
        ({"prompt": "b", "image": "a.png"}, "FluxPipeline", ValueError, r"f\.jsonl:1 has an 'image' .*Flux2Klein"),
    ],
)
def test_rows_that_cannot_be_edited_are_refused_before_a_model_is_loaded(
    row: dict[str, Any], model: str, error: type[Exception], message: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes((folder / "a.png").read_bytes())
    lines = [json.dumps(each) + "\n" for each in ({"prompt": "a", "image": "a.png"}, row)]
    (tmp_path / "f.jsonl").write_text("".join(lines))
    with pytest.raises(error, match=message):
        check_edits(load_prompts(str(tmp_path / "f.jsonl")), model=model)


def test_every_recipe_refuses_instructions_for_a_model_that_cannot_edit(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": "shapes", "run_folder": str(tmp_path / "run")}
    prompts = str(folder / "edits.jsonl")
    for main, config in (
        (flow_grpo.main, flow_grpo.Config(**options | {"model": "shapes-flow"}, prompts=prompts)),
        (best_of_n.main, best_of_n.Config(**options, prompts=prompts)),
        (evaluate_policy.main, evaluate_policy.Config(**options, evaluation_prompts=prompts)),
    ):
        with pytest.raises(ValueError, match=r"edits\.jsonl:1 has an 'image' to edit, and the model 'shapes"):
            main(config)
    config = collect_preferences.Config(**options, weights="base,base", evaluation_prompts=prompts)
    with pytest.raises(ValueError, match=r"edits\.jsonl:1 .* which the annotation page does not show"):
        collect_preferences.main(config)
    assert not (tmp_path / "run").exists()


# --- sampling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_edited_images_equal_those_of_the_stock_pipeline(
    guidance_scale: float, folder: Path, policy: DiffusionPolicy, tiny_flux2: Path
) -> None:
    """Two images that are edited in one batch by one instruction, each as the stock pipeline edits it alone."""
    prompts, pipeline = load_prompts(str(folder / "edits.jsonl")), pipeline_of(tiny_flux2)
    pipeline.image_processor.check_image_input = lambda _: None  # it asks for 64 x 64 pixels
    sampler = sampler_of(policy, guidance_scale=guidance_scale)
    found, _ = generate(policy, prompts, sampler=sampler, generators=seeded(7, 8), microbatch_size=2)
    for image, name, generator in zip(found, "ab", seeded(7, 8), strict=True):
        [expected] = pipeline(
            image=Image.open(folder / f"{name}.png"), prompt=PROMPTS[0], num_inference_steps=4, height=16, width=16,
            generator=generator, output_type="pt", guidance_scale=guidance_scale,
        ).images  # fmt: skip
        assert_close(image, expected, rtol=0, atol=2e-5)
    assert (found[0] - found[1]).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch: just slower
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaying_an_edit_gives_ratio_one(dtype: torch.dtype, folder: Path, tiny_flux2: Path) -> None:
    """The reference image is resized and cropped to the size of the images, which need not be square."""
    policy = policy_of(tiny_flux2, dtype, resolution=(8, 24))
    prompts = [EditPrompt("a fox", folder / name) for name in ("wide.png", "a.png")]
    assert policy.encode(prompts).parts["image"].shape == (2, 16, 2, 6)
    sampler = sampler_of(policy, eta=1.0, guidance_scale=4.0)
    _, trajectory = rollout(policy, prompts, sampler=sampler, generators=seeded(1, 2), microbatch_size=2)
    for step in torch.arange(4):
        latents, conditioning = trajectory.latents[:, step], trajectory.conditioning[torch.arange(2)]
        transition = transition_at(policy, latents, step.expand(2), conditioning, sampler=sampler)
        replayed = mean_log_prob(transition, trajectory.latents[:, step + 1])
        assert_close(replayed, trajectory.log_probs[:, step], rtol=0, atol=0)


def test_a_policy_that_cannot_edit_refuses_an_instruction(folder: Path, tiny_sd: Path) -> None:
    with pytest.raises(ValueError, match=r"generates from text alone; it cannot edit the image '.*a\.png'"):
        policy_of(tiny_sd).encode([EditPrompt("a fox", folder / "a.png")])


# --- preference pairs -----------------------------------------------------------------------------------


def test_pairs_of_edits_are_encoded_with_their_reference_image_and_cached_with_it(
    folder: Path, policy: DiffusionPolicy, tmp_path: Path
) -> None:
    """Saved pairs are read again; with a cache an update sees the same; a replaced reference image is encoded anew."""
    prompts = [EditPrompt(PROMPTS[0], folder / f"{name}.png") for name in "ab"]
    images, scores = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4.0).view(2, 2)
    chosen = torch.tensor([1, 3]), torch.tensor([0, 2])
    save_pairs(tmp_path / "pairs.jsonl", images, prompts, scores, chosen, first=0)
    pairs = load_same_prompt_pairs([str(tmp_path / "pairs.jsonl")], image_root=None, skipped=None, with_references=True)
    assert [key_of(prompt).partition("\0")[0] for prompt in instructions_of(pairs)] == [PROMPTS[0], PROMPTS[0]]

    def loaded(**options: Any) -> Tensor:
        found = ImagePairs(pairs, policy=policy, read=to_tensor, microbatch_size=4, **options)
        found.fill_cache(rank=0, num_processes=1)
        return found.load([0, 1], [0, 1], step=0).conditioning.parts["image"]

    expected = policy.encode(prompts).parts["image"]
    assert_close(loaded(), expected, rtol=0, atol=0)
    assert_close(loaded(cache_folder=tmp_path / "cache"), expected, rtol=0, atol=0)
    reference = pairs[0].reference
    assert reference is not None
    reference.write_bytes((folder / "wide.png").read_bytes())
    loaded(cache_folder=tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "text").glob("*.safetensors"))) == 2


def test_reward_models_refuse_pairs_of_edits(folder: Path, tmp_path: Path) -> None:
    row = {"prompt": "make it red", "image": "a.png", "winner": "b.png", "loser": "wide.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadRecordError, match=r"pairs\.jsonl:1: the pair has an 'image' that was edited, .*a\.png"):
        load_records(tmp_path / "pairs.jsonl", image_root=folder)


# --- recipes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [None, "pairs.jsonl"])
def test_training_on_edits_resumes_and_is_evaluated_with_a_reward_that_gets_the_source_image(
    pairs: str | None, folder: Path, tiny_flux2: Path, tmp_path: Path
) -> None:
    prompts = str(folder / "edits.jsonl")
    options = as_for_toy_models(
        model=str(tiny_flux2), resolution=16, lora_rank=2, num_denoising_steps=2, evaluation_rewards=LIKENESS,
        num_evaluation_images=2, checkpoint_every=1, evaluate_every=0, microbatch_size=4, num_steps=1,
        run_folder=str(tmp_path / "run"), num_cpu_threads=1, evaluation_prompts=prompts,
    )  # fmt: skip
    if pairs is None:
        sampled = {"prompts": prompts, "rewards": LIKENESS, "prompts_per_step": 2, "images_per_prompt": 2}
        config, main = flow_grpo.Config(**options | sampled), flow_grpo.main
    else:
        row = {"prompt": "a fox", "image": "a.png", "winner": "b.png", "loser": "wide.png"}
        (folder / pairs).write_text(json.dumps(row) + "\n")
        given = {"pairs": str(folder / pairs), "pairs_per_step": 2, "proportion_empty_prompts": 0.5}
        config, main = diffusion_dpo.Config(**options | given), diffusion_dpo.main
    main(config)
    run = main(config.with_options(num_steps=2, resume=True))
    assert [row["gradient_norm"] > 0 for row in rows(run, "train")] == [True, True]
    assert all(row[LIKENESS] < 0 for row in rows(run, "evaluation"))


@pytest.mark.slow
def test_a_search_edits_each_image(folder: Path, tiny_flux2: Path, tmp_path: Path) -> None:
    config = best_of_n.Config(
        model=str(tiny_flux2), resolution=16, prompts=str(folder / "edits.jsonl"), images_per_prompt=1,
        num_candidates=2, num_denoising_steps=2, rewards=LIKENESS, guidance_scale=1.0, num_cpu_threads=1,
        run_folder=str(tmp_path / "run"),
    )  # fmt: skip
    first, second = best_of_n.main(config)
    for found in (first, second):
        scores = found.row["searched"]["scores"]["reward"]
        assert scores[found.row["searched"]["selected"]] == max(scores)
    assert first.row["searched"]["scores"] != second.row["searched"]["scores"]
