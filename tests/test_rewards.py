"""The table of rewards, weighted sums, and the checks of what a reward returns."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from reward_model import scorers
from rlhf_t2i.config import parse_config
from rlhf_t2i.rewards.builtin import jpeg_compressibility, jpeg_incompressibility, oracle_graded, oracle_pass
from rlhf_t2i.rewards.load import CheckedReward, WeightedSum, load_reward, load_rewards
from rlhf_t2i.rewards.table import REWARDS, find_reward, markdown_table
from rlhf_t2i.rewards.terms import parse_terms
from rlhf_t2i.settings import ddpo, draft
from rlhf_t2i.shapes.scenes import parse_prompt, render

ROOT = Path(__file__).parent.parent
PROMPTS = ["a fox", "a pear", "a boat"]
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def returning(result: Any) -> CheckedReward:
    """A reward that always returns the same object."""
    return CheckedReward("constant", lambda images, prompts: result)


# --- the table ------------------------------------------------------------------------------------


def test_the_table_in_the_docs_is_the_table_in_the_code() -> None:
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert markdown_table() in page, "write rlhf_t2i.rewards.table.markdown_table() into docs/rewards.md"


def test_the_table_is_imported_without_torch() -> None:
    command = "import sys, rlhf_t2i.rewards.table; assert not {'torch', 'numpy', 'httpx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("recipe", [ddpo, draft])
def test_option_help_lists_the_names_and_that_of_draft_only_what_may_have_a_gradient(
    recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_config(recipe.Config, arguments=["--help"])
    (section,) = re.findall(r"--rewards TEXT.*?\(NAME: (.*?);", capsys.readouterr().out, flags=re.DOTALL)
    expected = [entry.name for entry in REWARDS if recipe is ddpo or entry.differentiable is not False]
    assert "".join(section.split()) == ",".join(expected)


def test_the_table_has_every_scorer_of_other_projects() -> None:
    paths = {entry.name.removesuffix(":PATH") for entry in REWARDS if entry.takes_path}
    assert paths == {"llava_reward", "ocr", "pairwise", "soft_tifa", "vlm:URL", *scorers.NAMES}


@pytest.mark.parametrize(
    ("name", "row", "argument"),
    [
        ("oracle", "oracle", ""),
        ("llava_reward:runs/a:b", "llava_reward:PATH", "runs/a:b"),
        ("oracle:score", "module:function", "oracle:score"),
        ("my.rewards:score", "module:function", "my.rewards:score"),
        ("https://a:80|http://b:80", "http://HOST:PORT", "https://a:80|http://b:80"),
    ],
)
def test_a_name_is_found_with_the_argument_of_its_loader(name: str, row: str, argument: str) -> None:
    entry, found = find_reward(name)
    assert (entry.name, found) == (row, argument)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("oracle", oracle_graded),
        ("oracle_pass", oracle_pass),
        ("jpeg_compressibility", jpeg_compressibility),
        ("jpeg_incompressibility", jpeg_incompressibility),
    ],
)
def test_a_built_in_name_loads_that_reward(name: str, function: Any) -> None:
    reward = load_reward(name)
    assert reward.function is function
    assert reward.differentiable is False


@pytest.mark.parametrize("name", ["orcale", "clip"])
def test_an_unknown_reward_is_refused_and_the_known_ones_are_listed(name: str) -> None:
    with pytest.raises(ValueError, match=f"no reward '{name}'") as caught:
        load_rewards(f"oracle_pass,{name}=2")
    assert all(entry.name in str(caught.value) for entry in REWARDS)


# --- weighted sums --------------------------------------------------------------------------------


def test_a_weighted_sum_by_hand() -> None:
    """Red, green-blue and black: redness 1, 0, 0; brightness 1/3, 2/3, 0; total 0.5 r - 2 b."""
    images = torch.zeros(3, 3, 4, 4)
    images[0, 0], images[1, 1:] = 1, 1
    reward = WeightedSum(((CheckedReward("redness", redness), 0.5), (CheckedReward("brightness", brightness), -2.0)))
    total, scores = reward(images, PROMPTS)
    assert_close(total, torch.tensor([0.5 - 2 / 3, -4 / 3, 0.0]))
    assert_close(scores["redness"], torch.tensor([1.0, 0.0, 0.0]))
    assert_close(scores["brightness"], torch.tensor([1 / 3, 2 / 3, 0.0]))


def test_weights_are_parsed_and_default_to_one() -> None:
    reward = load_rewards(" jpeg_compressibility=0.5, jpeg_incompressibility ,oracle=-1e-1")
    assert [(term.name, weight) for term, weight in reward.terms] == [
        ("jpeg_compressibility", 0.5),
        ("jpeg_incompressibility", 1.0),
        ("oracle", -0.1),
    ]
    assert [term.name for term in reward.rewards] == ["jpeg_compressibility", "jpeg_incompressibility", "oracle"]


def test_a_parsed_sum_scores_like_its_terms() -> None:
    total, scores = load_rewards("jpeg_compressibility=0.5,jpeg_incompressibility")(IMAGES, PROMPTS)
    size = jpeg_incompressibility(IMAGES, PROMPTS)
    assert_close(total, 0.5 * size)
    assert_close(scores["jpeg_compressibility"], -size)


@pytest.mark.parametrize("specification", ["oracle,oracle", "oracle=0.5,jpeg_compressibility,oracle=2"])
def test_a_reward_given_twice_is_refused_by_name(specification: str) -> None:
    with pytest.raises(ValueError, match="'oracle' was given twice"):
        load_rewards(specification)


@pytest.mark.parametrize("weight", ["much", "", "nan", "inf", "1=2"])
def test_a_weight_that_is_no_finite_number_is_refused_with_its_text(weight: str) -> None:
    with pytest.raises(ValueError, match=f"'oracle={weight}' the weight '{weight}' is not a number"):
        load_rewards(f"oracle={weight}")


@pytest.mark.parametrize(
    ("specification", "expected"),
    [
        ("clip:runs/a b=2", [("clip:runs/a b", "2")]),
        ("""'clip:a,b=1'=0.5, oracle""", [("clip:a,b=1", "0.5"), ("oracle", None)]),
        ('clip:"a,b=1"=0.5,oracle', [("clip:a,b=1", "0.5"), ("oracle", None)]),
        ("m:f(scale=2, path='a,b)=')=3,oracle=1", [("m:f(scale=2, path='a,b)=')", "3"), ("oracle", "1")]),
        ("m:f(sizes=(1, 2)),oracle", [("m:f(sizes=(1, 2))", None), ("oracle", None)]),
    ],
)
def test_commas_and_equals_signs_in_quotes_and_parentheses_belong_to_the_name(
    specification: str, expected: list[tuple[str, str | None]]
) -> None:
    assert parse_terms(specification) == expected


@pytest.mark.parametrize("specification", ["'clip:a,oracle", "m:f(scale=2,oracle", "m:f(path='a),oracle"])
def test_what_is_not_closed_is_refused(specification: str) -> None:
    with pytest.raises(ValueError, match="is not closed"):
        parse_terms(specification)


@pytest.mark.parametrize("specification", ["", " ", ",,"])
def test_an_empty_list_is_refused_and_the_known_names_are_listed(specification: str) -> None:
    with pytest.raises(ValueError, match=r"No reward was given; choose from llava_reward, .* oracle"):
        load_rewards(specification)


# --- results that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_names_the_reward_and_the_prompt(value: float) -> None:
    with pytest.raises(ValueError, match=rf"'constant' returned {value} for the prompt 'a pear' \(image 1 of 3\)"):
        returning(torch.tensor([1.0, value, 2.0]))(IMAGES, PROMPTS)


def test_a_half_precision_overflow_is_not_hidden() -> None:
    with pytest.raises(ValueError, match="inf for the prompt 'a boat'"):
        returning(torch.tensor([1.0, 2.0, 1e6]).half())(IMAGES, PROMPTS)


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (2,), (4,), ()])
def test_a_wrong_shape_is_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"'constant' returned shape .* for 3 images; it must return \(3,\)") as caught:
        returning(torch.zeros(shape))(IMAGES, PROMPTS)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (1.0, "a float"),
        (None, "a NoneType"),
        ((1.0, 2.0, 3.0), "a tuple"),
        ((torch.zeros(3), {}), "a tuple"),
        ({"reward": torch.zeros(3)}, "a dict"),
        ([1.0, None, 3.0], "a list with a NoneType"),
        ([1.0, "2", 3.0], "a list with a str"),
        ([torch.zeros(1)] * 3, r"a list with a torch.float32 tensor of shape \(1,\)"),
        (np.array(["1", "2", "3"]), "an array of <U1"),
        (torch.zeros(3, dtype=torch.complex64), "torch.complex64"),
    ],
    ids=["number", "nothing", "tuple", "tensor and dict", "dict", "list with None", "list with text", "list of tensors",
         "texts", "complex"],
)  # fmt: skip
def test_a_wrong_type_is_refused_by_name(result: Any, shown: str) -> None:
    with pytest.raises(TypeError, match=f"'constant' returned {shown}; it must return one number for each image"):
        returning(result)(IMAGES, PROMPTS)


def test_a_list_or_array_of_another_length_is_refused_with_both_lengths() -> None:
    with pytest.raises(ValueError, match="'constant' returned a list of length 2 for 3 images"):
        returning([1.0, 2.0])(IMAGES, PROMPTS)
    with pytest.raises(ValueError, match=r"'constant' returned shape \(4,\) for 3 images"):
        returning(np.zeros(4))(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8], ids=lambda dtype: str(dtype)
)
def test_a_tensor_of_any_type_becomes_float32_scores(dtype: torch.dtype) -> None:
    rewards = returning(torch.tensor([0, 1, 3], dtype=dtype))(IMAGES, PROMPTS)
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    "result",
    [
        [0.5, -1.25, 3],
        [np.float64(0.5), np.float16(-1.25), np.int8(3)],
        [torch.tensor(0.5), torch.tensor(-1.25, dtype=torch.float64), torch.tensor(3)],
        np.array([0.5, -1.25, 3.0], dtype=np.float16),
        np.array([0.5, -1.25, 3.0], dtype=">f8"),
        np.array([0.5, -1.25, 3.0], dtype=np.longdouble),
    ],
    ids=["numbers", "numpy numbers", "tensors of one number", "half array", "big-endian array", "long array"],
)
def test_a_list_or_an_array_becomes_float32_scores(result: Any) -> None:
    rewards = returning(result)(IMAGES, PROMPTS)
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [0.5, -1.25, 3.0]


def test_a_list_of_tensors_keeps_its_gradient() -> None:
    images = IMAGES.clone().requires_grad_()
    reward = CheckedReward("own", lambda images, prompts: [image.mean() for image in images])
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert_close(images.grad, torch.full_like(images, 1 / images[0].numel()))


# --- what a reward may do with its arguments ------------------------------------------------------


def stretched(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Normalise in place, as many a preprocessing does."""
    images.sub_(0.5).mul_(2)
    return images.mean((1, 2, 3))


def overwritten(images: Tensor, prompts: list[str]) -> np.ndarray:
    """Write by numpy, which torch does not notice."""
    prompts.reverse()
    images.detach().numpy()[:] = 0
    return np.zeros(len(images))


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("first", [stretched, overwritten])
def test_a_reward_that_writes_into_its_images_and_prompts_changes_them_for_no_other(
    first: Any, batch_size: int | None
) -> None:
    images, prompts = IMAGES.clone(), list(PROMPTS)
    writes, reads = CheckedReward("writes", first), CheckedReward("reads", brightness)
    for terms in ([writes, reads], [reads, writes]):
        _, scores = WeightedSum(tuple((term, 1.0) for term in terms))(images, prompts, batch_size=batch_size)
        assert_close(scores["reads"], brightness(IMAGES, PROMPTS), rtol=0, atol=0)
    assert torch.equal(images, IMAGES)
    assert prompts == PROMPTS


def test_scores_outlive_the_memory_that_a_reward_uses_again() -> None:
    memory = torch.zeros(1)

    def reused(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return memory.copy_(images.mean((1, 2, 3)))

    total, _ = WeightedSum(((CheckedReward("reused", reused), 1.0),))(IMAGES, PROMPTS, batch_size=1)
    assert_close(total, brightness(IMAGES, PROMPTS))


# --- built in -------------------------------------------------------------------------------------


def pil_kilobytes(image: Tensor) -> float:
    pixels = np.uint8(np.rint(image.permute(1, 2, 0).numpy() * 255))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


def test_jpeg_compressibility_is_minus_the_kilobytes_of_the_file_that_pil_writes() -> None:
    images = torch.rand(4, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    images[1] = 0.5
    images[2, :, :20] = 0
    rewards = jpeg_compressibility(images, ["", "", "", ""])
    assert_close(rewards, torch.tensor([-pil_kilobytes(image) for image in images]))
    assert_close(jpeg_incompressibility(images, ["", "", "", ""]), -rewards)


def test_a_plain_image_compresses_better_than_noise() -> None:
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = torch.full((1, 3, 64, 64), 0.3)
    plain_reward, noise_reward = jpeg_compressibility(torch.cat([plain, noise]), ["", ""]).tolist()
    assert plain_reward > noise_reward + 3


def test_jpeg_clamps_values_outside_zero_and_one() -> None:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 3 - 1
    assert torch.equal(jpeg_compressibility(image, [""]), jpeg_compressibility(image.clamp(0, 1), [""]))


@pytest.mark.parametrize("reward", [oracle_graded, oracle_pass])
def test_the_oracle_scores_the_right_image_one_and_the_wrong_one_low(reward: Callable[..., Tensor]) -> None:
    prompts = ["a red circle on a blue background", "a green square on a white background"]
    images = render([parse_prompt(prompt) for prompt in prompts], rng=np.random.default_rng(0))
    assert_close(reward(images, prompts), torch.ones(2), rtol=0, atol=0.1)
    assert (reward(images, prompts[::-1]) < 0.5).all()


def test_the_oracle_refuses_a_prompt_outside_the_toy_world_with_its_text() -> None:
    with pytest.raises(ValueError, match=r"'a fox'.*not in the grammar"):
        load_reward("oracle")(IMAGES[:1], ["a fox"])
