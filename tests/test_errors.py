"""What a user can mend is said in one line, also below `accelerate launch`; a bug keeps its traceback."""

from __future__ import annotations

import json
import linecache
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.errors import exit_with, is_for_user
from rlhf_t2i.settings.base import Settings
from tests import processes
from tests.launch import ROOT, environment

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    code: str = ""
    """Python that the recipe executes."""


def failing(code: str, *, module: str) -> Exception:
    """The exception of a piece of code in a module of that name."""
    try:
        execute(code, module=module)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def execute(code: str, *, module: str) -> None:
    """Execute code as that of a module, whose lines a traceback can show."""
    linecache.cache["<code>"] = (len(code), None, code.splitlines(keepends=True), "<code>")
    exec(compile(code, "<code>", "exec"), {"__name__": module})


def recipe(config: Config) -> None:
    execute(config.code, module="recipes.ddpo")


@pytest.mark.parametrize(
    ("code", "module", "for_user"),
    [
        ("raise ValueError('rank is 0')", "rlhf_t2i.models.lora", True),
        ("raise TypeError(\n    'no list'\n)", "reward_model.scoring", True),
        ("raise FileNotFoundError('no run')", "__main__", True),
        (
            "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('n is 0') from e",
            "rlhf_t2i.seeds",
            True,
        ),
        ("open('/nowhere/at/all')", "rlhf_t2i.data.prompts", True),
        ("from pathlib import Path\nPath('/nowhere/at/all').read_text()", "rlhf_t2i.data.prompts", True),
        ("int('many')", "rlhf_t2i.data.prompts", False),
        ("first, second = [1]", "rlhf_t2i.data.prompts", False),
        ("{}['name']", "rlhf_t2i.data.prompts", False),
        ("import json\njson.loads('{')", "rlhf_t2i.data.prompts", False),
        ("assert 1 == 2", "rlhf_t2i.data.prompts", False),
        ("raise ValueError('of my own')", "my_reward", False),
        ("open('/nowhere/at/all')", "my_reward", False),
    ],
)
def test_an_error_is_for_the_user_if_the_project_raised_it(code: str, module: str, for_user: bool) -> None:
    assert is_for_user(failing(code, module=module)) == for_user


def test_an_os_error_of_a_library_is_for_the_user_unless_a_reward_called_it() -> None:
    library: dict[str, Any] = {"__name__": "hub"}
    code = "def fetch():\n    raise OSError('There is no owner/name on the Hub')"
    exec(compile(code, "/lib/site-packages/hub.py", "exec"), library)

    def error_of(module: str) -> Exception:
        with pytest.raises(OSError, match="no owner/name") as caught:
            exec("fetch()", {"__name__": module, **{"fetch": library["fetch"]}})
        return caught.value

    assert is_for_user(error_of("reward_model.backbones.load"))
    assert not is_for_user(error_of("my_reward"))


FULL_DISK = """
import resource, signal, torch
from safetensors.torch import save_file
from rlhf_t2i.errors import is_for_user
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for save in (save_file, torch.save):
    try:
        save({"x": torch.zeros(10_000)}, "x")
    except Exception as error:
        print(type(error).__name__, is_for_user(error))
"""


def test_a_full_disk_is_for_the_user_whatever_the_library_raises(tmp_path: Path) -> None:
    output = processes.run([sys.executable, "-c", FULL_DISK], cwd=tmp_path)
    assert output.stdout == "SafetensorError True\nRuntimeError True\n", output


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("raise ValueError('rank is 0;\\n  it must be 1')", "error: rank is 0; it must be 1\n"),
        ("raise KeyError('There is no perspective')", "error: There is no perspective\n"),
        ("open('/nowhere/at/all')", "error: /nowhere/at/all: No such file or directory\n"),
    ],
)
def test_an_error_for_the_user_is_one_line_and_status_2(
    code: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(recipe, Config(code=code))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == line


def test_the_line_of_an_error_is_its_own_below_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bar = tqdm(total=3, desc="training")
    with pytest.raises(SystemExit):
        run_command(recipe, Config(code="raise ValueError('rank is 0')"))
    assert bar.n == 0, "the bar is still referred to, as by a loop that an error has left"
    assert capsys.readouterr().err.splitlines()[-1] == "error: rank is 0"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(recipe, Config(code="1 / 0"))


def test_debug_shows_the_traceback_of_every_error() -> None:
    config = parse_config(Config, arguments=["--debug", "--code", "raise ValueError('rank is 0')"])
    with pytest.raises(ValueError, match="rank is 0"):
        run_command(recipe, config)
    with pytest.raises(ValueError, match="there is no option --cod"):
        parse_config(Config, arguments=["--debug", "--cod", "1"])
    parse_config(Config, arguments=[])
    with pytest.raises(SystemExit):
        run_command(recipe, config)


def test_every_command_reports_its_errors_in_one_line() -> None:
    commands = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "rlhf_t2i").glob("*/__main__.py")]
    assert len(commands) > 12
    for path in commands:
        last = path.read_text().splitlines()[-1]
        assert "run_command(main, " in last or "run_command(or_plan(main), " in last, path


def test_of_several_processes_the_first_reports_and_records_the_line_for_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("rlhf_t2i.errors.time.sleep", waited.append)
    for rank in (1, 0):
        record = tmp_path / str(rank) / "error.json"
        record.parent.mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(record))
        with pytest.raises(SystemExit):
            exit_with(f"rank {rank} failed")
    assert capsys.readouterr().err == "error: rank 1 failed\n"
    assert len(waited) == 1
    assert json.loads((tmp_path / "1" / "error.json").read_text())["message"] == "error: rank 1 failed"
    assert not (tmp_path / "0" / "error.json").exists()


def test_the_last_line_below_accelerate_launch_is_the_reason() -> None:
    """The launcher is a real process: what is written after its traceback waits for its end."""
    command = [*LAUNCH, "accelerate_configs/single.yaml", "recipes/ddpo.py", "--lora_rank", "0"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: lora_rank is 0; it must be ")
    assert "CalledProcessError" in lines[-2]


def test_a_process_that_no_launcher_started_reports_once_whatever_its_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("rlhf_t2i.errors.os.getppid", os.getpid)
    started: list[Any] = []
    monkeypatch.setattr("rlhf_t2i.errors.subprocess.Popen", lambda command, **options: started.append(command))
    with pytest.raises(SystemExit):
        exit_with("rank is 0")
    assert capsys.readouterr().err == "error: rank is 0\n"
    assert not started


@pytest.mark.slow
def test_two_processes_name_the_reason_once_and_in_the_launchers_table_and_leave_no_folder(tmp_path: Path) -> None:
    command = [*LAUNCH, "accelerate_configs/ddp.yaml", "recipes/ddpo.py", "--model", "./nowhere"]
    command += ["--prompts", "shapes", "--rewards", "oracle"]
    result = processes.run([*command, "--run_folder", str(tmp_path / "run")])
    reason = "error: There is no model folder './nowhere'."
    assert result.returncode == 1
    assert [line.startswith(reason) for line in result.stderr.splitlines()].count(True) == 1
    assert result.stderr.splitlines()[-2].startswith(f"  traceback : {reason}")
    assert 'File "recipes/ddpo.py"' not in result.stderr
    assert not (tmp_path / "run").exists()
