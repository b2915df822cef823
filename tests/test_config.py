"""Command lines and YAML files become settings, or an error that names the option."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from annotated_types import Ge, Gt, Le

from rlhf_t2i.config import parse_config, require
from rlhf_t2i.settings.base import Group, Rule, Settings, options_of
from rlhf_t2i.settings.help import GROUPS, help_of
from rlhf_t2i.settings.lists import names

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
COMMANDS = [*RECIPES, "report", "reward_server"]


@dataclass(frozen=True, kw_only=True)
class Shared(Settings, group="optimiser"):
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    """Size of a step."""
    num_steps: Annotated[int, Ge(1)] = 3
    """Number of steps."""


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    num_steps: Annotated[int, Ge(1)] = 5
    eta: Annotated[float, Gt(0), Le(1), Group("sampling")] = 1.0
    """Noise."""
    clip: Annotated[float, Gt(0)] | None = None
    """Range; null is 50 % of something."""
    mode: Literal["no", "fp16"] | None = None
    """Precision."""
    resume: bool = False
    """Continue."""
    run_folder: str | None = None
    """Folder."""

    def rules(self) -> list[Rule]:
        return [*super().rules(), ("clip", self.clip is None or self.clip < self.eta, f"below eta ({self.eta})")]


def parse(*arguments: str) -> Config:
    return parse_config(Config, "A recipe.", arguments=arguments)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message that ends the command, which is one line."""
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message.removeprefix("error: ").rstrip("\n")


def file_with(folder: Path, text: str) -> str:
    (folder / "c.yaml").write_text(text)
    return str(folder / "c.yaml")


# --- where values come from -----------------------------------------------------------------------


def test_no_argument_at_all_gives_the_defaults() -> None:
    assert parse() == Config()


def test_the_command_line_wins_over_the_file_wherever_it_stands(tmp_path: Path) -> None:
    file = file_with(tmp_path, "learning_rate: 0.5\nnum_steps: 7\n")
    expected = Config(learning_rate=0.5, num_steps=9)
    assert parse("--config", file, "--num_steps", "9") == expected
    assert parse("--num_steps", "9", "--config", file) == expected
    assert parse("--num_steps=9", f"--config={file}") == expected


def test_a_later_file_wins_over_an_earlier_one(tmp_path: Path) -> None:
    first = file_with(tmp_path, "learning_rate: 0.5\nnum_steps: 7\n")
    (tmp_path / "second.yaml").write_text("num_steps: 8\n")
    assert parse("--config", first, "--config", str(tmp_path / "second.yaml")) == Config(learning_rate=0.5, num_steps=8)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert parse("--config", file_with(tmp_path, "# only a comment\n")) == Config()


def test_a_flag_alone_is_true() -> None:
    assert parse("--resume", "--num_steps", "2") == Config(resume=True, num_steps=2)
    assert parse("--resume").resume
    assert not parse("--resume", "false").resume


@pytest.mark.parametrize("word", ["null", "none", "None"])
def test_null_is_none_where_none_is_possible(tmp_path: Path, word: str) -> None:
    assert parse("--clip", word, "--run_folder", word) == Config()
    assert parse("--config", file_with(tmp_path, f"clip: {word}\nrun_folder:\n")) == Config()


def test_values_of_a_file_are_read_as_those_of_the_command_line(tmp_path: Path) -> None:
    """YAML itself would read `no` as false and 1e-2 as text."""
    file = file_with(tmp_path, "mode: no\nclip: 1e-2\nrun_folder: 3\nresume: true\n")
    assert parse("--config", file) == Config(mode="no", clip=0.01, run_folder="3", resume=True)


def test_whole_numbers_are_numbers_too() -> None:
    assert repr(Config(eta=1, clip=0.5)) == repr(Config(eta=1.0, clip=0.5))


def test_print_config_writes_a_file_that_gives_the_same_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--print_config", "--mode", "no", "--clip", "1e-8")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == asdict(Config(mode="no", clip=1e-8))
    assert parse("--config", file_with(tmp_path, text)) == Config(mode="no", clip=1e-8)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate", "3"], "there is no option --lerning_rate. Did you mean learning_rate?"),
        (["--learning_rat", "3"], "there is no option --learning_rat. Did you mean learning_rate?"),
        (["--learning", "3"], "there is no option --learning."),
        (["--l_rate", "3"], "there is no option --l_rate. Did you mean learning_rate?"),
        (["--lerning_rate=3"], "there is no option --lerning_rate. Did you mean learning_rate?"),
        (["stray"], "'stray' belongs to no option."),
        (["--num_steps"], "argument --num_steps: expected one argument"),
        (["--num_steps", "many"], "num_steps is many; it must be a whole number, at least 1."),
        (["--num_steps", "2.5"], "num_steps is 2.5; it must be a whole number, at least 1."),
        (["--num_steps", "0"], "num_steps is 0; it must be at least 1."),
        (["--num_steps", "null"], "num_steps is null; it must be a whole number, at least 1."),
        (["--learning_rate", "0"], "learning_rate is 0; it must be positive."),
        (["--learning_rate", "nan"], "learning_rate is nan; it must be a finite number, positive."),
        (["--clip", "inf"], "clip is inf; it must be a finite number or null, positive."),
        (["--num_steps", "9" * 19], "num_steps is 9999999999999999999; it must be below 2^63."),
        (["--num_steps", "9" * 5000], f"num_steps is {'9' * 100}...; it must be a whole number, at least 1."),
        (["--eta", "1.5"], "eta is 1.5; it must be in (0, 1]."),
        (["--clip", "wide"], "clip is wide; it must be a number or null, positive."),
        (["--mode", "bf16"], "mode is bf16; it must be one of no, fp16 or null."),
        (["--resume", "perhaps"], "resume is perhaps; it must be true or false."),
        (["--clip", "2"], "clip is 2.0; it must be below eta (1.0)."),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 0.5\n", ":1: there is no option lerning_rate. Did you mean learning_rate?"),
        ("# comment\nnum_steps: many\n", ":2: num_steps is many; it must be a whole number, at least 1."),
        ("num_steps: 1\nnum_steps: 2\n", ":2: num_steps is given twice."),
        ("num_steps: [1, 2]\n", ":1: num_steps is a list or mapping; it must be one value."),
        ("- num_steps\n", " holds no options; write one 'name: value' a line."),
        ("num_steps: {\n", " is not YAML: "),
        ("num_steps: " + "[" * 100_000, " is not YAML: values are nested more than 100 deep"),
        ("a: &a [1, 1]\nb: [*a, *a]\n", " is not YAML: *a repeats a list"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = file_with(tmp_path, text)
    assert refusal(capsys, "--config", file).startswith(f"{file}{message}")


def test_a_file_in_another_encoding_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_bytes("run_folder: caf\u00e9\n".encode("latin-1"))
    assert refusal(capsys, "--config", str(tmp_path / "c.yaml")).startswith(f"{tmp_path / 'c.yaml'} is not UTF-8: ")


def test_settings_made_in_python_obey_the_same_ranges_and_rules() -> None:
    with pytest.raises(ValueError, match=r"^num_steps is 0; it must be at least 1\.$"):
        Config(num_steps=0)
    with pytest.raises(ValueError, match=r"^clip is 2\.0; it must be below eta \(1\.0\)\.$"):
        replace(Config(), clip=2.0)


def test_a_required_option_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    settings = importlib.import_module("rlhf_t2i.settings.compare").Config
    with pytest.raises(SystemExit):
        parse_config(settings, arguments=[])
    assert capsys.readouterr().err == "error: the option --runs is required.\n"


def test_a_missing_extra_is_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    require("json", extra="serve")
    with pytest.raises(SystemExit) as stopped:
        require("json", "no_such_module", extra="serve")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: no_such_module is not installed: pip install 'rlhf-t2i[serve]'\n"


def test_the_annotation_page_names_its_extra_if_fastapi_is_missing() -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['fastapi'] = None\n"
        "sys.argv = ['collect_preferences.py', '--runs', 'a']\n"
        "runpy.run_module('recipes.collect_preferences', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: fastapi is not installed: pip install 'rlhf-t2i[serve]'\n"


# --- help -----------------------------------------------------------------------------------------


def help_text(config_class: Any, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_config(config_class, "First line.\n\n    kept   as it is\n", arguments=["--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_states_type_range_default_and_group(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(Config, capsys)
    sections = {part.split(":")[0]: " ".join(part.split()) for part in text.split("\n\n")}
    assert "--eta FLOAT Noise. (in (0, 1]; default: 1.0)" in sections["sampling"]
    assert "--num_steps INT Number of steps. (at least 1; default: 5)" in sections["optimiser"]
    assert "Range; null is 50 % of something. (positive or null; default: null)" in sections["algorithm"]
    assert "--mode {no,fp16} Precision. (default: null)" in sections["algorithm"]
    assert "--resume [true|false] Continue. (default: false)" in sections["algorithm"]
    assert "    kept   as it is" in text


@pytest.mark.parametrize("columns", [80, 120])
def test_help_wraps_to_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    settings = importlib.import_module("rlhf_t2i.settings.flow_grpo").Config
    widths = [len(line) for line in help_text(settings, capsys).splitlines()]
    assert columns - 20 < max(widths) < columns


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_has_help_and_a_group(command: str) -> None:
    settings = importlib.import_module(f"rlhf_t2i.settings.{command}").Config
    texts = help_of(settings)
    for option in options_of(settings):
        text = texts[option.name]
        assert re.match(r"[A-Z].*\.$", text), f"--{option.name}: {text}"
        assert not re.match(r"(Of|By|In|What|Whether|How|Those|Which|Where)\b", text), f"--{option.name}: {text}"
        assert option.group in GROUPS, option.name


@pytest.mark.parametrize("command", COMMANDS)
def test_no_imports_refuses_code_in_every_option_that_names_rewards(command: str) -> None:
    settings = importlib.import_module(f"rlhf_t2i.settings.{command}").Config
    for name in [option.name for option in options_of(settings) if option.names]:
        given = {"weights": "base,x"} if command == "collect_preferences" else {}
        with pytest.raises(ValueError, match=r"^\w+ is \S*stranger\S*:f\S*; it must be without module:function"):
            settings(**given, no_imports=True, **{name: "stranger.py:f" if name == "rewards" else "stranger:f"})


def test_one_option_has_one_type_and_group_in_all_recipes() -> None:
    found: dict[str, set[tuple[Any, str]]] = {}
    for command in COMMANDS:
        for option in options_of(importlib.import_module(f"rlhf_t2i.settings.{command}").Config):
            found.setdefault(option.name, set()).add((option.base, option.group))
    differing = {name for name, kinds in found.items() if len(kinds) > 1}
    # Each recipe has its own choices of these, and publish a dry run of its own.
    assert differing == {"advantages", "dry_run", "loss"}


def test_help_and_mistakes_are_answered_without_torch() -> None:
    heavy = ("torch", "jaxtyping", "diffusers", "transformers", "trl", "accelerate", "fastapi", "uvicorn", "numpy")
    modules = [f"recipes.{name}" if name in RECIPES else f"rlhf_t2i.{name}" for name in COMMANDS]
    code = f"""
import contextlib, io, runpy, sys
for module in {modules}:
    for option in ("--help", "--no_such_option"):
        sys.argv = ["command", option]
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=False)
            except SystemExit as stopped:
                status = stopped.code
        print(module, option, status, *sorted(set({heavy}) & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    answers = {"--help": 0, "--no_such_option": 2}
    expected = [f"{module} {option} {status}" for module in modules for option, status in answers.items()]
    assert result.stdout.splitlines() == expected
    assert set(result.stderr.splitlines()) == {"error: there is no option --no_such_option."}


def test_the_changelogs_table_of_renamed_options_is_true() -> None:
    table = (ROOT / "CHANGELOG.md").read_text().split("#### Options")[1].split("####")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "--" in line]
    checked = 0
    for recipes, old, new in rows:
        if "`python" in recipes or "all" in recipes or "--pairs" in old:
            continue
        before, after = (set(re.findall(r"--(\w+)", cell)) for cell in (old, new))
        for recipe in re.findall(r"`(\w+)`", recipes):
            settings = importlib.import_module(f"rlhf_t2i.settings.{recipe}").Config
            known = {option.name for option in options_of(settings)}
            assert after <= known, (recipe, after)
            assert not (before - after) & known, (recipe, before)
            checked += 1
    assert checked > 30


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_config_is_the_one_of_its_settings(recipe: str) -> None:
    config_class = importlib.import_module(f"recipes.{recipe}").Config
    assert config_class is importlib.import_module(f"rlhf_t2i.settings.{recipe}").Config
    assert [field.name for field in fields(config_class)] == [option.name for option in options_of(config_class)]


def test_a_list_may_have_blanks() -> None:
    assert names(" a , b=2,, ") == ["a", "b=2"]
