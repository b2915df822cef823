"""A prompt is a row: what its file says about it reaches the reward, and a reward says what it needs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from recipes import best_of_n, ddpo, evaluate_policy
from rlhf_t2i.annotation.questions import from_images, read_questions, score_questions, write_questions
from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.prompt_rows import Prompt, as_prompts, metadata_of
from rlhf_t2i.rewards.gradient import score_with_gradient
from rlhf_t2i.rewards.load import as_checked, as_weighted_sum, load_reward, load_rewards
from rlhf_t2i.rewards.rows import check_prompts
from rlhf_t2i.rewards.trial import try_rewards
from rlhf_t2i.rewards.wire_format import JSON, MAX_METADATA_BYTES, TooLargeError, pack, unpack
from rlhf_t2i.search import api
from rlhf_t2i.search.context import Veto
from rlhf_t2i.training.prompt_sets import PromptSets
from tests.runs import REDNESS, REDNESS_OF_ROWS
from tests.toys import GaussianModel

ROWS = [{"prompt": "a fox", "size": 2.0}, {"prompt": "a sign", "size": 5.0, "include": [{"class": "sign"}]}]
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SIZES = torch.tensor([2.0, 5.0])
LIMITS: dict[str, Any] = {"max_images": 8, "max_bytes": 2**20}


def size_of_row(images: Tensor, prompts: Sequence[str], metadata: list[dict[str, Any]]) -> Tensor:
    """The field `size` of each row; the rows are changed, as a reward may do."""
    return images.new_tensor([float(row.pop("size")) for row in metadata])


class Needy:
    """A reward that needs a field; it is not to be loaded before that is known."""

    required_fields = ("size",)

    def __init__(self) -> None:
        raise AssertionError("The reward was loaded.")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.new_zeros(len(images))

    @staticmethod
    def check_row(metadata: Mapping[str, Any]) -> None:
        if metadata["size"] < 0:
            raise ValueError(f"its size is {metadata['size']}; it must be positive.")


NEEDY = f"{__name__}:Needy()"


def json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(folder: Path, suffix: str) -> str:
    path, table = folder / f"prompts.{suffix}", pd.DataFrame(ROWS)
    match suffix:
        case "jsonl":
            path.write_text(json_lines(ROWS))
        case "json":
            path.write_text(json.dumps(ROWS))
        case "csv":
            table.to_csv(path, index=False)
        case _:
            table.to_parquet(path)
    return str(path)


# --- the row reaches the reward -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_the_row_of_each_file_format_reaches_a_reward_with_metadata(tmp_path: Path, suffix: str) -> None:
    prompts = load_prompts(written(tmp_path, suffix))
    total, _ = load_rewards(f"{__name__}:size_of_row=2,{REDNESS}=0")(IMAGES, prompts)
    assert_close(total, 2 * SIZES)
    assert_close(load_reward(f"{__name__}:size_of_row")(IMAGES, prompts), SIZES)  # the rows were copies


def test_a_plain_text_is_a_row_with_its_prompt_alone(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n")
    assert metadata_of(load_prompts(str(tmp_path / "prompts.txt"))) == [{"prompt": "a fox"}]
    assert metadata_of(["a fox"]) == [{"prompt": "a fox"}]


def test_a_third_parameter_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"argument: 'rows'. A third parameter, .*, is named metadata"):
        as_checked(lambda images, prompts, rows: images)  # pyright: ignore[reportArgumentType]


def test_prompts_given_in_python_are_rows() -> None:
    prompts = as_prompts(["a pear", ROWS[1]])
    assert prompts == ["a pear", "a sign"]
    assert metadata_of(prompts) == [{"prompt": "a pear"}, ROWS[1]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a fox", "it must be a list of texts or rows"),
        ([], "it must be a list of texts or rows"),
        (["a fox", {"text": "FOX"}], r"prompt 1 is .*; it must be a text, or a row with a text under 'prompt'"),
        ([{"prompt": "a fox", "image": torch.zeros(1)}], r"prompt 0, 'a fox', has fields that are no JSON: .*Tensor"),
    ],
)
def test_prompts_given_in_python_that_are_no_rows_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_prompts(prompts)


def test_searches_from_python_score_rows() -> None:
    veto = Veto(as_checked(size_of_row), 3.0)
    settings: dict[str, Any] = {"num_denoising_steps": 2, "guidance_scale": 1.0, "veto": veto}
    found = api.best_of_n(GaussianModel(), ROWS, size_of_row, num_candidates=2, **settings)
    assert_close(found.scores.reward, SIZES[:, None].expand(2, 2))
    assert found.scores.vetoed.tolist() == [[True, True], [False, False]]
    settings |= {"num_particles": 2, "reward_std": 1.0, "eta": 1.0, "resample_after": [1]}
    steered = api.fk_steering(GaussianModel(), ROWS, size_of_row, **settings)
    assert_close(steered.candidates.scores.reward, SIZES[:, None].expand(2, 2))


def test_a_pixel_gradient_is_of_a_reward_with_metadata() -> None:
    reward = as_weighted_sum(lambda images, prompts, metadata: images.mean((1, 2, 3)) * metadata[0]["size"])
    scored = score_with_gradient(reward, IMAGES[:1], as_prompts(ROWS[:1]))
    assert_close(scored.pixel_gradient, torch.full_like(IMAGES[:1], 2.0 / 192))


def test_questions_for_annotators_keep_their_rows(tmp_path: Path) -> None:
    prompts = as_prompts(ROWS)
    write_questions(tmp_path, from_images(prompts, IMAGES, 1 - IMAGES, sources=("a", "b")))
    questions = read_questions(tmp_path)
    assert questions is not None
    scores = score_questions(
        as_weighted_sum(size_of_row), tmp_path, questions, device=torch.device("cpu"), batch_size=2
    )
    assert_close(scores, SIZES[:, None].expand(2, 2))


def test_prompts_that_are_held_back_keep_their_rows_in_the_run_folder(tmp_path: Path) -> None:
    PromptSets([], as_prompts(ROWS), chosen_here=True).save(tmp_path)
    assert metadata_of(load_prompts(str(tmp_path / "evaluation_prompts.jsonl"))) == ROWS


# --- a reward says what it needs ------------------------------------------------------------------


def test_one_bad_row_of_ten_thousand_is_named_before_a_reward_is_loaded(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"fox {i}", "size": 1} for i in range(10_000)]
    del rows[7_000]["size"]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json_lines(rows))
    with pytest.raises(ValueError, match=r"prompts.jsonl:7001 has no 'size', which the reward '.*Needy\(\)' needs;"):
        check_prompts(f"{REDNESS},{NEEDY}=0.5", load_prompts(str(path)))


def test_a_row_that_a_reward_cannot_use_is_named_with_the_reason() -> None:
    with pytest.raises(
        ValueError, match=r"prompt 2: the reward .* cannot use this row: its size is -3; it must be pos"
    ):
        check_prompts(NEEDY, as_prompts([*ROWS, {"prompt": "a pear", "size": -3}]))


@pytest.mark.parametrize("option", ["rewards", "evaluation_rewards", "veto"])
@pytest.mark.parametrize("recipe", [ddpo, best_of_n, evaluate_policy])
def test_a_recipe_names_the_row_before_anything_is_loaded(tmp_path: Path, recipe: Any, option: str) -> None:
    if option not in recipe.Config.__dataclass_fields__:
        return
    path = tmp_path / "prompts.jsonl"
    path.write_text(json_lines([*ROWS, {"prompt": "a pear", "size": None}]))
    places = {"prompts", "evaluation_prompts"} & recipe.Config.__dataclass_fields__.keys()
    config = recipe.Config(**dict.fromkeys(places, str(path)), **{option: NEEDY})
    with pytest.raises(ValueError, match=r"prompts.jsonl:3 has no 'size', which"):
        recipe.main(config)


def test_a_call_without_the_field_is_an_error_of_the_reward() -> None:
    with pytest.raises(ValueError, match=r"prompt 1 has no 'text', which the reward '.*RednessOfRows\(\)' needs"):
        load_reward(REDNESS_OF_ROWS)(IMAGES, [Prompt("a fox", {"text": "A FOX"}), "a pear"])
    with pytest.raises(ValueError, match=r"prompt 1 has no 'text'"):
        try_rewards(load_rewards(REDNESS_OF_ROWS), [Prompt("a fox", {"text": "A FOX"}), "a pear"])


def test_required_fields_that_are_one_text_are_refused() -> None:
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))

    reward.required_fields = "text"  # pyright: ignore[reportFunctionMemberAccess]
    with pytest.raises(ValueError, match=r"'reward' has the required_fields 'text'; it must be a list of names"):
        as_checked(reward)(IMAGES, ["a fox", "a pear"])


def test_a_score_that_is_nan_names_its_reward_among_several() -> None:
    def broken(images: Tensor, prompts: Sequence[str]) -> list[float]:
        return [0.5, float("nan")]

    reward = replace(as_weighted_sum(size_of_row), terms=((as_checked(size_of_row), 1.0), (as_checked(broken), 0.0)))
    with pytest.raises(ValueError, match=r"The reward 'broken' returned nan for the prompt 'a sign' \(image 1 of 2\)"):
        reward(IMAGES, as_prompts(ROWS))


# --- over HTTP ------------------------------------------------------------------------------------


def png_request(**fields: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    images = [base64.b64encode(buffer.getvalue()).decode()] * 2
    return json.dumps({"prompts": ["a fox", "a sign"], "images": images, **fields}).encode()


def test_rows_travel_in_both_forms_of_a_request_and_only_if_they_say_something() -> None:
    _, prompts = unpack(pack(IMAGES, as_prompts(ROWS)), "application/x-safetensors", **LIMITS)
    assert metadata_of(prompts) == ROWS
    _, prompts = unpack(png_request(metadata=ROWS), JSON, **LIMITS)
    assert metadata_of(prompts) == ROWS
    assert pack(IMAGES, [Prompt("a fox"), Prompt("a sign")]) == pack(IMAGES, ["a fox", "a sign"])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([{}], "The metadata must be a JSON list of 2 objects, one for each prompt"),
        ("FOX", "The metadata must be a JSON list of 2 objects"),
        ([{}, "FOX"], "The metadata of prompt 1 is a str; it must be a JSON object"),
    ],
)
def test_metadata_that_is_no_json_object_is_refused(metadata: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(png_request(metadata=metadata), JSON, **LIMITS)


def test_metadata_is_limited_in_size() -> None:
    rows = [{"prompt": "a fox", "text": "x" * MAX_METADATA_BYTES}] * 2
    with pytest.raises(TooLargeError, match=r"metadata of the prompts has 2.0 MB as JSON; .* at most 1 MB"):
        pack(IMAGES, as_prompts(rows))
    with pytest.raises(TooLargeError, match="at most 1 MB"):
        unpack(png_request(metadata=rows), JSON, **LIMITS)
