"""Command lines and YAML files become a config, or an error that names the field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes import ddpo
from rlhf_t2i.config import names, parse_config


@dataclass(frozen=True, kw_only=True)
class Config:
    learning_rate: float = 1e-4
    num_steps: int = 3
    resume: bool = False
    run_folder: str | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1.")


def parse(*arguments: str) -> Config:
    return parse_config(Config, description="A recipe.", arguments=arguments)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("learning_rate: 0.5\nnum_steps: 7\n")
    config = parse("--config", str(tmp_path / "c.yaml"), "--num_steps", "9")
    assert config == Config(learning_rate=0.5, num_steps=9)


def test_no_argument_at_all_gives_the_defaults() -> None:
    assert parse() == Config()


def test_a_flag_alone_is_true() -> None:
    assert parse("--resume", "--num_steps", "2") == Config(resume=True, num_steps=2)
    assert parse("--resume").resume
    assert not parse("--resume", "false").resume


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate", "3"], "Did you mean learning_rate?"),
        (["--learning_rat", "3"], "Did you mean learning_rate?"),
        (["--num_steps", "many"], "num_steps"),
        (["--num_steps", "0"], "num_steps is 0; it must be at least 1."),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_mistake_in_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("lerning_rate: 0.5\n")
    with pytest.raises(SystemExit):
        parse("--config", str(tmp_path / "c.yaml"))
    assert "lerning_rate" in (error := capsys.readouterr().err)
    assert "Did you mean learning_rate?" in error


def test_help_says_what_each_field_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(ddpo.Config, description=ddpo.__doc__ or "", arguments=["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Of the ratio of densities averaged over latent numbers" in text
    assert "--clip_range" in text


def test_a_list_may_have_blanks() -> None:
    assert names(" a , b=2,, ") == ["a", "b=2"]
