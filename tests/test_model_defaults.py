"""Defaults depend on the model: those of the toy world are for its own models only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_t2i.config import parse_config
from rlhf_t2i.models.table import FAMILIES
from rlhf_t2i.models.weights import check_run
from rlhf_t2i.rewards.terms import join_terms, parse_terms
from rlhf_t2i.settings import (
    best_of_n,
    collect_preferences,
    ddpo,
    diffusion_dpo,
    diffusion_nft,
    draft,
    evaluate_policy,
    fk_steering,
    flow_grpo,
)
from rlhf_t2i.settings.from_run import other_bases
from rlhf_t2i.settings.paths import Inputs, Prefix, Rewards, resolve_paths
from rlhf_t2i.settings.ranges import BASE
from rlhf_t2i.shapes.names import TOY_MODEL_FOLDER, TOY_REWARD_MODELS
from rlhf_t2i.training.prompt_sets import load_prompt_sets
from tests.launch import ROOT
from tests.runs import REDNESS, rows

PAGE = ROOT / "docs" / "rewards.md"

TRAINING = {m.__name__.split(".")[-1]: m for m in (ddpo, flow_grpo, diffusion_nft, draft, diffusion_dpo)}
SEARCH = {m.__name__.split(".")[-1]: m for m in (best_of_n, fk_steering)}
TOY_REWARDS = "oracle,oracle_pass,llava_reward"


def pipeline(folder: Path, name: str = "StableDiffusionXLPipeline") -> str:
    """A folder that says its pipeline class and holds nothing else."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return str(folder)


def refusal(capsys: pytest.CaptureFixture[str], config_class: Any, *arguments: str) -> str:
    with pytest.raises(SystemExit):
        parse_config(config_class, arguments=arguments)
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- built-in and other models ------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TRAINING))
def test_a_built_in_model_needs_no_option(name: str) -> None:
    config = TRAINING[name].Config()
    assert (config.prompts, config.evaluation_prompts, config.rewards) == ("shapes", "shapes", "llava_reward")
    assert (config.evaluation_rewards, config.num_evaluation_images) == (TOY_REWARDS, 408)
    assert (config.num_denoising_steps, config.guidance_scale, config.lora_rank, config.microbatch_size) == (
        8,
        1,
        None,
        64,
    )


@pytest.mark.parametrize("name", [*TRAINING, *SEARCH])
def test_another_model_needs_prompts_and_rewards_which_one_line_asks_for(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, {**TRAINING, **SEARCH}[name].Config, "--model", str(tmp_path / "no_such_folder_is_read"))
    assert "prompts and rewards must be given" in line
    assert "--prompts prompts.txt --rewards " in line


def test_only_what_is_missing_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, ddpo.Config, "--model", str(tmp_path), "--prompts", "p.txt")
    assert "so rewards must be given" in line
    line = refusal(capsys, evaluate_policy.Config, "--model", str(tmp_path))
    assert "evaluation_prompts and evaluation_rewards must be given" in line


@pytest.mark.parametrize(("family", "entry"), FAMILIES.items())
def test_steps_guidance_rank_and_memory_come_from_the_family(family: str, entry: Any, tmp_path: Path) -> None:
    given = {"model": pipeline(tmp_path / "m", family), "prompts": "p.txt", "rewards": "a:b"}
    config = diffusion_nft.Config(**given)
    assert (config.num_denoising_steps, config.num_evaluation_steps) == (entry.training_steps, entry.sampling_steps)
    assert (config.guidance_scale, config.lora_rank) == (entry.guidance_scale, entry.lora_rank)
    assert (config.microbatch_size, config.gradient_checkpointing) == (
        entry.microbatch_size,
        entry.gradient_checkpointing,
    )
    assert f"lora_rank {entry.lora_rank}" in config.defaults_text()
    assert best_of_n.Config(**given).num_denoising_steps == entry.sampling_steps


def test_given_options_win_and_an_explicit_null_trains_all_weights(tmp_path: Path) -> None:
    given = {"prompts": "shapes", "rewards": "oracle", "num_denoising_steps": 7, "guidance_scale": 2.0}
    config = ddpo.Config(model=pipeline(tmp_path / "m"), lora_rank=None, **given)
    assert (config.lora_rank, config.num_denoising_steps, config.guidance_scale) == (None, 7, 2.0)
    assert "guidance_scale" not in config.defaults_text()
    assert "complex_human_instruction" not in config.defaults_text()  # alike for all models, and only SANA's
    assert ddpo.Config().defaults_text().startswith("defaults  model shapes, guidance_scale 1.0")
    assert "num_evaluation_steps 50" in config.defaults_text()


def test_a_family_that_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a KolorsPipeline; supported are StableDiffusionPipeline, "):
        ddpo.Config(model=pipeline(tmp_path / "m", "KolorsPipeline"), prompts="p.txt", rewards="a:b")


def test_the_model_can_be_changed_later_and_its_defaults_follow(tmp_path: Path) -> None:
    config = ddpo.Config(num_steps=3, guidance_scale=2.0)
    changed = config.with_options(model="FluxPipeline", prompts="p.txt", rewards="a:b")
    assert (changed.num_steps, changed.guidance_scale, changed.lora_rank) == (3, 2.0, 32)
    assert changed.evaluation_rewards == "a:b"


def test_own_pairs_need_neither_prompts_nor_rewards_but_something_to_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", pipeline(tmp_path / "m"), "--pairs", "pairs.jsonl"]
    assert "evaluation_prompts and evaluation_rewards must be given, for example: --evaluation_prompts " in refusal(
        capsys, diffusion_dpo.Config, *model
    )
    for given in ("evaluation_rewards", "rewards"):
        assert "one, so evaluation_prompts must be given, for example:" in refusal(
            capsys, diffusion_dpo.Config, *model, f"--{given}", "oracle"
        )
    evaluated = [*model, "--evaluation_prompts", "p.txt", "--evaluation_rewards", "oracle"]
    config = parse_config(diffusion_dpo.Config, arguments=evaluated)
    assert (config.prompts, config.rewards) == ("", "")
    assert "one, so evaluation_rewards must be given, for example:" in refusal(
        capsys, diffusion_dpo.Config, *evaluated[:-2]
    )


# --- what is evaluated --------------------------------------------------------------------------------


def test_trained_rewards_are_evaluated_too() -> None:
    config = ddpo.Config(rewards="oracle=2,jpeg_compressibility=0.1", evaluation_rewards="oracle_pass,oracle")
    assert config.evaluation_rewards == "oracle_pass,oracle,jpeg_compressibility"
    assert ddpo.Config(rewards="a:b", evaluation_rewards="oracle", early_stop_reward="a:b").early_stop_reward == "a:b"


def prompt_sets(tmp_path: Path, prompts: list[str], **options: Any) -> Any:
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    options = {"evaluation_prompts": None, **options}
    return load_prompt_sets(ddpo.Config(prompts=str(tmp_path / "p.txt"), **options))


def test_a_tenth_of_the_distinct_prompts_is_held_back(tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(40)] * 2
    sets = prompt_sets(tmp_path, prompts)
    assert len(sets.evaluation) == 4
    assert sorted(sets.training + 2 * sets.evaluation) == sorted(prompts)
    assert (sets.num_shared, sets.title) == (0, "held-out prompts")
    assert sets.text() == "36 prompts to train on, 4 held back for evaluation"
    assert prompt_sets(tmp_path, prompts, seed=5).evaluation == sets.evaluation
    assert len(prompt_sets(tmp_path, [f"prompt {i}" for i in range(1000)]).evaluation) == 64


def test_a_single_prompt_is_trained_and_evaluated_on_and_not_called_held_out(tmp_path: Path) -> None:
    sets = prompt_sets(tmp_path, ["a fox", "a fox"])
    assert (sets.training, sets.evaluation, sets.title) == (["a fox"] * 2, ["a fox"], "evaluation prompts")
    assert sets.text() == "1 evaluation prompts, of which 1 are also trained on"
    sets.save(tmp_path)
    assert json.loads((tmp_path / "evaluation_prompts.jsonl").read_text()) == {"prompt": "a fox"}


def test_evaluation_prompts_that_are_trained_on_are_counted(tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_text("a fox\na hen\na cow\n")
    sets = prompt_sets(tmp_path, ["a fox", "a hen", "a cat"], evaluation_prompts=str(tmp_path / "e.txt"))
    assert sets.text() == "3 evaluation prompts, of which 2 are also trained on"
    assert sets.title == "evaluation prompts"


def test_a_run_evaluates_the_prompts_it_held_back_and_so_does_a_later_evaluation(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from recipes import ddpo as recipe

    prompts = [f"a {animal}" for animal in ("fox", "hen", "cow", "cat", "dog", "owl")]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    folder = recipe.main(
        ddpo.Config(
            model=str(tiny_sd),
            prompts=str(tmp_path / "p.txt"),
            rewards=REDNESS,
            num_denoising_steps=2,
            num_steps=1,
            prompts_per_step=5,
            images_per_prompt=2,
            num_evaluation_images=2,
            evaluate_every=0,
            num_evaluation_steps=3,
            run_folder=str(tmp_path / "run"),
            num_cpu_threads=1,
        )
    )
    printed = capsys.readouterr().out
    assert "5 prompts to train on, 1 held back for evaluation" in printed
    assert "guidance_scale 5.0, " in printed
    held_back = [json.loads(line)["prompt"] for line in (folder / "evaluation_prompts.jsonl").read_text().splitlines()]
    scores = json.loads((folder / "images" / "step_000001.json").read_text())
    assert scores["prompts"] == held_back * 2
    assert list(scores["scores"]) == [REDNESS]
    assert json.loads((folder / "run.json").read_text())["evaluation_prompts"]["trained_on"] == 0
    assert len(rows(folder, "train")) == 1

    config = evaluate_policy.Config(weights=f"base,{folder},{folder / 'checkpoints' / 'step_000001'}")
    assert (config.model, config.num_evaluation_steps, config.guidance_scale) == (str(tiny_sd), 3, 5.0)
    assert (config.evaluation_prompts, config.evaluation_rewards) == (str(folder / "evaluation_prompts.jsonl"), REDNESS)


# --- settings of the run whose weights are used -------------------------------------------------------


def run_with(folder: Path, **changes: Any) -> str:
    folder.mkdir()
    settings = {"model": "a/b", "resolution": 24, "num_denoising_steps": 5, "num_evaluation_steps": None,
                "guidance_scale": 3.0, "evaluation_prompts": "e.txt", "evaluation_rewards": "oracle"}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, **changes}))
    (folder / "run.json").write_text("{}")
    return str(folder)


def test_search_and_annotation_sample_as_the_run_whose_weights_they_use(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run")
    found = best_of_n.Config(weights=f"{run}/lora", prompts="p.txt", rewards="oracle", microbatch_size=2)
    assert (found.model, found.resolution, found.num_denoising_steps, found.guidance_scale) == ("a/b", 24, 5, 3.0)
    page = collect_preferences.Config(weights=f"base,{run}", microbatch_size=2, guidance_scale=1.0)
    assert (page.model, page.num_evaluation_steps, page.guidance_scale) == ("a/b", 5, 1.0)
    assert page.evaluation_prompts == "e.txt"


def test_one_option_of_the_image_size_replaces_the_size_of_the_run(tmp_path: Path) -> None:
    square = run_with(tmp_path / "square")
    wide = run_with(tmp_path / "wide", resolution=None, height=16, width=40)
    for run, options, size in (
        (square, {}, 24),
        (square, {"height": 8, "width": 16}, (8, 16)),
        (wide, {}, (16, 40)),
        (wide, {"resolution": 32}, 32),
        (wide, {"height": 40, "width": 16}, (40, 16)),
        (f"{square},{wide}", {"resolution": 32}, 32),
    ):
        assert evaluate_policy.Config(weights=run, microbatch_size=2, **options).image_size == size
    with pytest.raises(ValueError, match="width is 16 and height is null; give both"):
        evaluate_policy.Config(weights=wide, microbatch_size=2, width=16)
    with pytest.raises(ValueError, match=r"differ in resolution: .*square has 24, .*wide has null. Give --resolution"):
        evaluate_policy.Config(weights=f"{square},{wide}", microbatch_size=2)


def test_runs_of_different_base_models_are_refused_and_both_are_named(tmp_path: Path) -> None:
    first, second = run_with(tmp_path / "first"), run_with(tmp_path / "second", model="c/d")
    with pytest.raises(ValueError, match=r"different models cannot be used together: .*a/b, .*c/d") as raised:
        evaluate_policy.Config(weights=f"{first},{second}")
    assert first in str(raised.value)


def test_a_sibling_of_a_runs_base_needs_its_own_steps_and_guidance_and_has_the_runs_prompts(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run")
    given: dict[str, Any] = {"weights": run, "model": "c/d", "microbatch_size": 2}
    missing = r"--model is c/d, .*run is a/b\. .*: give --num_evaluation_steps and --guidance_scale too"
    with pytest.raises(ValueError, match=missing):
        evaluate_policy.Config(**given)
    with pytest.raises(ValueError, match="give --num_denoising_steps too"):
        best_of_n.Config(**given, guidance_scale=1.0, prompts="p.txt", rewards="oracle")
    found = evaluate_policy.Config(**given, num_evaluation_steps=4, guidance_scale=1.0)
    assert (found.model, found.num_evaluation_steps, found.guidance_scale) == ("c/d", 4, 1.0)
    assert (found.evaluation_prompts, found.resolution) == ("e.txt", 24)
    assert other_bases([BASE, run, f"{run}/lora"], "c/d") == {run: "a/b", f"{run}/lora": "a/b"}
    assert other_bases([run], "a/b") == {}


def test_weights_of_runs_that_differ_in_an_option_need_that_option(tmp_path: Path) -> None:
    held_back = {"evaluation_prompts": None, "evaluation_rewards": "oracle,a:b"}
    first = run_with(tmp_path / "first", **held_back)
    second = run_with(tmp_path / "second", **held_back | {"evaluation_rewards": "a:b,oracle", "guidance_scale": 7.5})
    for run in (first, second):
        Path(run, "evaluation_prompts.jsonl").write_text('{"prompt": "a fox"}')
    differ = (
        "the runs of the weights differ in guidance_scale: .*first has 3.0, .*second has 7.5. Give --guidance_scale"
    )
    with pytest.raises(ValueError, match=differ):
        collect_preferences.Config(weights=f"{first},{second}", microbatch_size=2)
    weights: dict[str, Any] = {"weights": f"{first},base,{second}", "microbatch_size": 2}
    with pytest.raises(ValueError, match=differ):
        evaluate_policy.Config(**weights)
    weights["guidance_scale"] = 5.0
    assert evaluate_policy.Config(**weights).evaluation_prompts == str(Path(first, "evaluation_prompts.jsonl"))
    Path(second, "evaluation_prompts.jsonl").write_text('{"prompt": "a hen"}')
    with pytest.raises(ValueError, match=r"differ in evaluation_prompts: .*first.*jsonl, .*second.*jsonl. Give --"):
        evaluate_policy.Config(**weights)
    assert evaluate_policy.Config(**weights, evaluation_prompts="p.txt").evaluation_prompts == "p.txt"


def test_the_same_base_model_may_be_given_by_another_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pipeline(tmp_path / "model")
    run = run_with(tmp_path / "run", model=model)
    monkeypatch.chdir(tmp_path)
    assert evaluate_policy.Config(weights=run, model="model", microbatch_size=2).resolution == 24
    toy = run_with(tmp_path / "toy", model="shapes")
    assert evaluate_policy.Config(weights=toy, model=str(TOY_MODEL_FOLDER), microbatch_size=2).resolution == 24
    monkeypatch.setenv("HOME", str(tmp_path))
    assert evaluate_policy.Config(weights="~/run", microbatch_size=2).model == model


# --- paths and names ----------------------------------------------------------------------------------


def test_paths_in_a_file_may_be_relative_to_it_and_those_of_the_command_line_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "p.txt").write_text("a fox")
    (folder / "r").mkdir()
    (folder / "c.yaml").write_text(
        "prompts: p.txt\nevaluation_prompts: other.txt\nrewards: llava_reward:r=0.5,oracle\nrun_folder: r\n"
    )
    monkeypatch.chdir(tmp_path)
    config = parse_config(ddpo.Config, arguments=["--config", "configs/c.yaml"])
    assert (config.prompts, config.evaluation_prompts) == ("configs/p.txt", "other.txt")
    assert config.rewards == "llava_reward:configs/r=0.5,oracle"
    assert config.run_folder == "r"
    assert parse_config(ddpo.Config, arguments=["--config", "configs/c.yaml", "--prompts", "p.txt"]).prompts == "p.txt"


SEVERAL = Inputs(several=True, names=("base", "shapes"))


@pytest.mark.parametrize(
    ("text", "kind", "expanded"),
    [
        ("~/p.txt", None, "HOME/p.txt"), ("~/a,~b", Inputs(), "HOME/a,~b"), ("a, ~/b", SEVERAL, "a, HOME/b"),
        ("~/a=~/b", Prefix(), "HOME/a=HOME/b"), ("runs/a~b", SEVERAL, "runs/a~b"), ("o/n", Inputs(), "o/n"),
        ("llava_reward:~/m=0.5,oracle", Rewards(), "llava_reward:HOME/m=0.5,oracle"),
        ("~/r.py:f(a=1, b='~/c')=2", Rewards(), "HOME/r.py:f(a=1, b='~/c')=2"), 
        ("'clip:~/a,b'", Rewards(), '"clip:HOME/a,b"'), ("clip:~/m", Rewards(several=False), "clip:HOME/m"),
        ("image_reward_db/alignment:~/x,ratings=3:~/y", SEVERAL, "image_reward_db/alignment:HOME/x,ratings=3:HOME/y"),
        ("http://host/~me", Rewards(), "http://host/~me"), ("~nobody_at_all/x", None, "~nobody_at_all/x"),
    ],
)  # fmt: skip
def test_the_home_folder_is_expanded_where_a_path_begins(
    text: str, kind: Any, expanded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve_paths(text, kind) == expanded.replace("HOME", "/home/me")
    assert ddpo.Config(run_folder="~/run").run_folder == "/home/me/run"


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("shapes", SEVERAL, "shapes"), ("./shapes", SEVERAL, "F/shapes"), ("base,f,none", SEVERAL, "base,F/f,none"),
        ("tie:f,hf:f@f,a:b", SEVERAL, "tie:F/f,hf:f@f,F/a:b"), ("a,b", Inputs(), "F/a,b"), ("f=f", Prefix(), "f=F/f"),
        ("oracle,clip:f,m:f=2", Rewards(), "oracle,clip:F/f,m:f=2"), ("'clip:a,b'=2", Rewards(), '"clip:F/a,b"=2'),
        ("f.py:g(1, 'f')", Rewards(), "F/f.py:g(1, 'f')"), ("clip:a,b", Rewards(several=False), "clip:F/a,b"),
        ("f", None, "f"),
        ("clip:f(device='cpu')", Rewards(), "clip:F/f(device='cpu')"),
    ],
)  # fmt: skip
def test_a_path_may_be_relative_to_its_file_and_a_name_is_no_path(
    text: str, kind: Any, expected: str, tmp_path: Path
) -> None:
    for name in ("shapes", "base", "f", "f.py", "m", "oracle", "a,b", "a:b", "clip"):
        (tmp_path / name).touch()
    assert resolve_paths(text, kind, folder=tmp_path) == expected.replace("F/", f"{tmp_path}/")


def test_a_file_beside_the_options_does_not_turn_a_name_into_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("shapes", "sampled", "oracle"):
        (tmp_path / name).mkdir()
    texts = {"model": "shapes", "prompts": "shapes", "pairs": "sampled", "rewards": "oracle"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(texts))
    monkeypatch.chdir(tmp_path)
    found = vars(parse_config(diffusion_dpo.Config, arguments=["--config", "c.yaml"]))
    assert {name: found[name] for name in texts} == texts
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(texts | {"prompts": "./shapes"}))
    assert parse_config(diffusion_dpo.Config, arguments=["--config", "c.yaml"]).prompts == "./shapes"


def test_the_config_of_a_run_means_the_same_files_as_its_command_line_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(run_with(tmp_path / "run", model="m", evaluation_rewards="clip:r", early_stop_reward="clip:r"))
    pipeline(tmp_path / "m")
    for name in ("r", "run/m", "run/r"):
        (tmp_path / name).mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps({"working_directory": str(tmp_path)}))
    for folder, start in ((tmp_path, ""), (tmp_path / "run", f"{tmp_path}/")):
        monkeypatch.chdir(folder)
        arguments = ["--config", str(run / "config.yaml"), "--prompts", "p.txt", "--rewards", "oracle"]
        config = parse_config(ddpo.Config, arguments=arguments)
        assert (config.model, config.evaluation_rewards) == (f"{start}m", f"clip:{start}r,oracle")
        assert config.early_stop_reward == f"clip:{start}r"
        used = evaluate_policy.Config(weights=str(run))
        assert (used.model, used.evaluation_rewards) == (f"{start}m", f"clip:{start}r")
        check_run(run, model=str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("oracle, jpeg_compressibility=0.1", [("oracle", None), ("jpeg_compressibility", "0.1")]),
        ("'clip:runs/a=b,c'=2", [("clip:runs/a=b,c", "2")]),
        ('"m:f",oracle=1', [("m:f", None), ("oracle", "1")]),
        ("m:f(scale=2,path='x,y')=3,oracle", [("m:f(scale=2,path='x,y')", "3"), ("oracle", None)]),
        (",", []),
    ],
)
def test_names_of_rewards_may_hold_commas_and_equals_signs(text: str, terms: list[tuple[str, str | None]]) -> None:
    assert parse_terms(text) == terms
    names = [name for name, _ in terms]
    assert parse_terms(join_terms(names)) == [(name, None) for name in names]


def test_a_quote_that_is_not_closed_is_named() -> None:
    with pytest.raises(ValueError, match="has a quote that is not closed"):
        parse_terms("'clip:a,oracle")


def test_rewards_in_a_file_may_be_a_list_or_a_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(
        'rewards:\n  oracle: 1\n  "clip:a=b,c": 0.5\nevaluation_rewards: [oracle, oracle_pass]\n'
    )
    config = parse_config(ddpo.Config, arguments=["--config", str(tmp_path / "c.yaml")])
    assert parse_terms(config.rewards) == [("oracle", "1"), ("clip:a=b,c", "0.5")]
    assert config.evaluation_rewards == 'oracle,oracle_pass,"clip:a=b,c"'
    (tmp_path / "c.yaml").write_text('rewards: [oracle=2, "clip:a,b", "clip:a=b", "m:f(x=1, y=2)", "\'clip:c=1\'=3"]\n')
    config = parse_config(ddpo.Config, arguments=["--config", str(tmp_path / "c.yaml")])
    assert parse_terms(config.rewards) == [
        ("oracle", "2"), ("clip:a,b", None), ("clip:a=b", None), ("m:f(x=1, y=2)", None), ("clip:c=1", "3"),
    ]  # fmt: skip
    (tmp_path / "c.yaml").write_text(PAGE.read_text().split("```yaml\n")[1].split("```")[0])
    config = parse_config(ddpo.Config, arguments=["--config", str(tmp_path / "c.yaml")])
    assert parse_terms(config.rewards) == [
        ("my_rewards:Sharpness(scale=2, weights='sharp.pt')", "0.5"), ("llava_reward:runs/lr=1e-4,b", "1"),
    ]  # fmt: skip
    (tmp_path / "c.yaml").write_text("rewards:\n  oracle: {a: 1}\n")
    assert "it must be one value, a list of names, or a mapping" in refusal(
        capsys, ddpo.Config, "--config", str(tmp_path / "c.yaml")
    )


def test_a_run_folder_is_a_reward(tmp_path: Path) -> None:
    from rlhf_t2i.output.run_folder import reward_model_of

    (tmp_path / "run" / "reward_model").mkdir(parents=True)
    (tmp_path / "run" / "reward_model" / "llava_reward.json").write_text("{}")
    assert reward_model_of(str(tmp_path / "run")) == str(tmp_path / "run" / "reward_model")
    assert reward_model_of(str(tmp_path / "run" / "reward_model")) == str(tmp_path / "run" / "reward_model")
    assert reward_model_of("owner/name") == "owner/name"
    assert {name: reward_model_of(name) for name in TOY_REWARD_MODELS} == {
        name: str(folder) for name, folder in TOY_REWARD_MODELS.items()
    }


@pytest.mark.parametrize("pipeline_class", FAMILIES)
def test_diffusion_dpo_starts_with_the_defaults_of_every_family(pipeline_class: str, tmp_path: Path) -> None:
    """Qwen-Image samples one image at a time; a pair has two."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline_class}))
    (tmp_path / "prompts.txt").write_text("a fox\n")
    config = diffusion_dpo.Config(
        model=str(tmp_path), pairs="pairs.jsonl", evaluation_prompts=str(tmp_path / "prompts.txt"),
        evaluation_rewards="jpeg_compressibility",
    )  # fmt: skip
    assert config.microbatch_size == max(2, FAMILIES[pipeline_class].microbatch_size)
