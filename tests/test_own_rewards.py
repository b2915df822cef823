"""A user's own rewards: functions, classes with arguments, files, and their trial before a model is loaded."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.rewards.builtin import jpeg_compressibility
from rlhf_t2i.rewards.gradient import require_gradient
from rlhf_t2i.rewards.load import as_checked, as_weighted_sum, load_reward, load_rewards
from rlhf_t2i.rewards.trial import try_rewards
from rlhf_t2i.training.evaluation import evaluate
from rlhf_t2i.types import Sampler
from tests.runs import redness
from tests.servers import free_port, scripted

ROOT = Path(__file__).parent.parent
PROMPTS = ["a fox", "a pear", "a boat"]
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BRIGHTNESS = IMAGES.mean((1, 2, 3))
OWN = """
from dataclasses import dataclass

import torch

def power(images, prompts, exponent=1, *, offset=0.0):
    return images.mean((1, 2, 3)) ** exponent + offset

@dataclass
class Power:
    exponent: float
    note: str = ""

    def __call__(self, images, prompts):
        return power(images, prompts, self.exponent)

squared = Power(2)

def with_info(images, prompts):
    return images.mean((1, 2, 3)), {"info": 1}

def one_for_all(images, prompts):
    return [images.mean().item()]

def of_one_image(images):
    return images.mean((1, 2, 3))

def with_a_typo(images, prompts):
    return images.mena((1, 2, 3))

def nan(images, prompts):
    return [float("nan")] * len(images)

class NoReward:
    pass

NOTHING = NoReward()
calls = []

def recorded(images, prompts):
    calls.append((images.shape, prompts))
    return torch.zeros(len(images))
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh working directory that leaves neither its path nor its modules behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_function_of_the_working_directory_is_a_reward(workplace: Path) -> None:
    (workplace / "my_rewards.py").write_text(
        "def greenness(images, prompts):\n    return images[:, 1].mean((1, 2)) + len(prompts[0])\n"
    )
    reward = load_rewards("my_rewards:greenness=2")
    assert_close(reward(IMAGES, PROMPTS)[0], 2 * (IMAGES[:, 1].mean((1, 2)) + 5))
    assert list(reward(IMAGES, PROMPTS)[1]) == ["my_rewards:greenness"]


def test_the_examples_in_the_docs_are_rewards(workplace: Path) -> None:
    page = (ROOT / "docs" / "rewards.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (workplace / "my_rewards.py").write_text("\n".join(examples))
    reward = load_rewards("my_rewards:brightness")
    assert_close(reward(IMAGES, PROMPTS)[0], BRIGHTNESS)
    require_gradient(reward, prompt="a fox")
    shown = [line for text in re.findall(r"^--rewards (.*)$", page, flags=re.MULTILINE) for line in shlex.split(text)]
    assert len(shown) == 2
    (workplace / "rewards").mkdir()
    (workplace / "rewards" / "my_rewards.py").write_text("\n".join(examples))
    for specification in shown:
        load_rewards(specification.replace("~", str(workplace)))(IMAGES, PROMPTS)


def test_a_function_of_an_installed_package_is_a_reward() -> None:
    reward = load_reward("rlhf_t2i.rewards.builtin:jpeg_compressibility")
    assert reward.function is jpeg_compressibility


@pytest.mark.parametrize(
    "name",
    ["no_such_module_here:score", "os.no_such_module:score", "no_such.module.here:score", "rlhf_t2i.no.such:score"],
)
def test_a_missing_module_is_refused_with_the_folder_that_was_searched(workplace: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' names a module that is neither installed nor in") as caught:
        load_reward(name)
    assert str(workplace) in str(caught.value)


@pytest.mark.parametrize("name", [":score", "..:score", ".my_rewards:score"])
def test_an_incomplete_module_name_is_refused_with_its_text(workplace: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}'"):
        load_reward(name)


@pytest.mark.parametrize("function", ["blueness", "", "SIZE"])
def test_a_missing_function_is_refused_by_name(workplace: Path, function: str) -> None:
    (workplace / "other_rewards.py").write_text("SIZE = 3\n")
    with pytest.raises(ValueError, match=f"module 'other_rewards' has no callable '{function}'"):
        load_reward(f"other_rewards:{function}")


def test_a_package_that_a_users_module_lacks_is_named(workplace: Path) -> None:
    """A message that the user's module is missing would be wrong."""
    (workplace / "needy_rewards.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_reward("needy_rewards:score")


# --- arguments ------------------------------------------------------------------------------------


@pytest.fixture
def own(workplace: Path) -> Path:
    """A module of rewards in the working directory."""
    path = workplace / "own.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize(
    ("name", "exponent"),
    [
        ("own:power", 1),
        ("own:power()", 1),
        ("own:power(exponent=3, offset=0.0)", 3),
        ("own:Power(2)", 2),
        ("own:Power(exponent=0.5, note='a, (b) = c')", 0.5),
        ("own:squared", 2),
    ],
)
def test_a_function_a_class_with_arguments_and_an_instance_are_rewards(own: Path, name: str, exponent: float) -> None:
    reward = load_rewards(f"{name}=2,jpeg_compressibility")
    assert [(term.name, weight) for term, weight in reward.terms] == [(name, 2.0), ("jpeg_compressibility", 1.0)]
    assert_close(reward.rewards[0](IMAGES, PROMPTS), BRIGHTNESS**exponent)


def test_a_class_is_instantiated_once_for_equal_arguments(own: Path) -> None:
    one, same, other = (load_reward(f"own:Power({n})").function for n in (2, 2, 3))
    assert one is same
    assert other is not one


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own:Power", r"'own:Power' is a class; give an instance of it, as in Power\(\)"),
        ("own:Power()", r"cannot be called with \(\): missing a required argument: 'exponent'"),
        ("own:Power(size=2)", r"cannot be called with \(size=2\): missing"),
        ("own:NoReward()", "'own:NoReward\\(\\)' is a NoReward, which cannot be called"),
        ("own:NOTHING", "has no callable 'NOTHING'"),
        ("own:power(3)", r"is no class, so its arguments need names, as in power\(scale=2\)"),
        (
            "own:power(exponents=3)",
            r"cannot be called with \(images, prompts, exponents=3\): got an unexpected keyword argument",
        ),
        ("own:of_one_image", r"cannot be called with \(images, prompts\): too many positional arguments"),
        ("own:Power(exponent=two)", r"not Python literals; text needs quotes, as in \(scale=2, path='weights.pt'\)"),
        ("own:Power(2)(3)", "not Python literals"),
        ("own:Power(**{})", "not Python literals"),
        ("own:Power(exponent=1, exponent=2)", "not Python literals"),
        ("own:power-2", "not of the form module:function or path/to/file.py:function"),
    ],
)
def test_a_reward_that_cannot_be_called_as_written_is_refused(own: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(name)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["sub folder/my-own.py", "~/sub folder/my-own.py", "{absolute}/sub folder/my-own.py"])
def test_a_function_of_a_file_is_a_reward(workplace: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """The file may have any name and import what lies beside it."""
    monkeypatch.setenv("HOME", str(workplace))
    folder = workplace / "sub folder"
    folder.mkdir()
    (folder / "my-own.py").write_text(f"import {(module := f'beside_{len(path)}')} as beside\n{OWN}")
    (folder / f"{module}.py").write_text("")
    name = f"{path.format(absolute=workplace)}:power(exponent=2)"
    assert_close(load_reward(name)(IMAGES, PROMPTS), BRIGHTNESS**2)


def test_a_file_is_executed_once(own: Path) -> None:
    one, same = load_reward("own.py:recorded"), load_reward(f"{own}:recorded")
    assert one.function is same.function


def test_a_missing_file_is_refused_with_its_whole_path(workplace: Path) -> None:
    with pytest.raises(ValueError, match=f"names a file that does not exist: {workplace / 'nowhere.py'}"):
        load_reward("nowhere.py:score")


def test_a_file_that_fails_is_executed_again_when_it_is_mended(workplace: Path) -> None:
    (workplace / "broken.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_reward("broken.py:power")
    (workplace / "broken.py").write_text(f"# mended\n{OWN}")
    assert_close(load_reward("broken.py:power")(IMAGES, PROMPTS), BRIGHTNESS)


# --- from Python ----------------------------------------------------------------------------------


def test_any_callable_is_a_sum_with_one_term_that_has_its_name() -> None:
    total, scores = as_weighted_sum(redness)(IMAGES, PROMPTS)
    assert list(scores) == ["redness"]
    assert torch.equal(total, redness(IMAGES, PROMPTS))
    assert as_checked(lambda images, prompts: [0.0] * 3).name == "reward"


def test_a_class_instead_of_an_instance_is_refused_in_python_too() -> None:
    class Own:
        def __call__(self, images: object, prompts: object) -> list[float]:
            return [0.0]

    with pytest.raises(ValueError, match=r"'Own' is a class; give an instance of it, as in Own\(\)"):
        as_weighted_sum(Own)  # type: ignore[arg-type]


# --- in an evaluation -----------------------------------------------------------------------------


def stretched(images: Tensor, prompts: Sequence[str]) -> Tensor:
    images.sub_(0.5).mul_(2)
    return images.mean((1, 2, 3))


def test_an_evaluation_reports_and_saves_the_sampled_images_whatever_a_reward_does_to_them(tiny_sd: Path) -> None:
    policy = load_policy(str(tiny_sd), device=torch.device("cpu"))
    sampler = Sampler(policy.schedule(2), partial(ddim, eta=0.0))
    rewards = [as_checked(stretched), as_checked(redness)]
    found = [
        evaluate(policy, PROMPTS, [1, 2, 3], order, sampler=sampler, microbatch_size=2)
        for order in (rewards[1:], rewards, rewards[::-1])
    ]
    for evaluation in found[1:]:
        assert torch.equal(evaluation.images, found[0].images)
        assert torch.equal(evaluation.scores["redness"], found[0].scores["redness"])
    assert_close(found[1].scores["stretched"], 2 * found[0].images.mean((1, 2, 3)) - 1)


# --- the trial ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("own:with_info", TypeError, "'own:with_info' returned a tuple; it must return one number for each image"),
        ("own:one_for_all", ValueError, "'own:one_for_all' returned a list of length 1 for 2 images"),
        ("own:with_a_typo", AttributeError, "mena"),
    ],
)
def test_a_reward_that_cannot_be_used_fails_in_the_trial(
    own: Path, name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        try_rewards(load_rewards(name), PROMPTS)
    assert "was tried on two random images of 64 x 64 pixels" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddpo", {"rewards": "own:with_info"}),
        ("ddpo", {"evaluation_rewards": "own:with_info"}),
        ("best_of_n", {"rewards": "own:with_info"}),
        ("best_of_n", {"rewards": "oracle", "veto": "own:with_info"}),
        ("best_of_n", {"rewards": "oracle", "evaluation_rewards": "own:with_info"}),
        ("evaluate_policy", {"weights": "base", "evaluation_rewards": "own:with_info"}),
        ("collect_preferences", {"weights": "base,base", "rewards": "own:with_info", "port": "0"}),
    ],
)
def test_recipes_try_each_reward_before_a_model_is_loaded_and_a_run_begins(
    own: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, str]
) -> None:
    recipe: Any = import_module(f"recipes.{name}")
    monkeypatch.setattr("rlhf_t2i.models.load.load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(TypeError, match="'own:with_info' returned a tuple"):
        recipe.main(recipe.Config(**options))
    assert not Path("runs").exists()


def test_the_trial_is_one_call_with_two_images_of_the_first_prompts(own: Path) -> None:
    reward = load_rewards("own:recorded")
    try_rewards(reward, PROMPTS)
    try_rewards(reward, PROMPTS[:1])
    calls = sys.modules["own"].calls
    assert calls == [((2, 3, 64, 64), ["a fox", "a pear"]), ((2, 3, 64, 64), ["a fox", "a fox"])]


def test_a_score_of_the_trial_may_be_nan(own: Path) -> None:
    try_rewards(load_rewards("own:nan"), PROMPTS)


def test_rewards_of_the_table_are_not_tried_and_servers_are_asked_only_whether_they_are_there() -> None:
    with scripted((404, {}, "nothing here")) as server:  # as of a server of one's own, which needs POST /score alone
        try_rewards(load_rewards(f"oracle,http://127.0.0.1:1|{server.address}"), PROMPTS)
        assert server.requests == ["/health"]


def test_a_server_that_is_not_there_is_said_at_once_and_ends_the_start_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("RLHF_T2I_SERVER_WAIT", "0.05")
    refused = rf"responded within 0\.05 s: {dead} \(.*refused\)\. Start it, .* variable RLHF_T2I_SERVER_WAIT\.$"
    with pytest.raises(ConnectionError, match=refused):
        try_rewards(load_rewards(dead), PROMPTS)
    assert [record.getMessage().partition(dead)[0] for record in caplog.records] == [
        "Waiting up to 0.05 s (RLHF_T2I_SERVER_WAIT) for "
    ]
    monkeypatch.setenv("RLHF_T2I_SERVER_WAIT", "soon")
    with pytest.raises(ValueError, match="RLHF_T2I_SERVER_WAIT is 'soon'; it must be seconds, at least 0"):
        try_rewards(load_rewards(dead), PROMPTS)
