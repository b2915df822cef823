"""What a run prints: tables that can be pasted, and colours on a terminal only."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest
import torch

from rlhf_t2i.output.terminal import coloured, has_colours
from rlhf_t2i.training.changes import before_after
from rlhf_t2i.training.evaluation import Evaluation, EvaluationTable
from tests.report_files import evaluation, train

_ROWS = [
    {**evaluation(0, 0.5, 0.01, elapsed=1.0), "worse": 1.0, "worse/standard_error": 0.1, "same": 0.0,
     "same/standard_error": 0.1},
    train(1, elapsed=30.0),
    {**evaluation(2, 0.7, 0.01, elapsed=61.0), "worse": 0.0, "worse/standard_error": 0.1, "same": 0.1,
     "same/standard_error": 0.1},
]  # fmt: skip


def test_each_line_of_the_last_table_has_the_colour_of_its_change() -> None:
    """And without the codes it is the table of a file."""
    text = before_after(_ROWS, colours=True)
    marked = [(line[2:4].rstrip("m"), line.split("m", 1)[1].split()[0]) for line in text.split("\n") if "\033" in line]
    assert marked == [("2", "before"), ("32", "oracle"), ("31", "worse"), ("2", "same")]
    assert re.sub(r"\033\[\d+m", "", text) == before_after(_ROWS)
    assert "\033" not in before_after(_ROWS)


def test_evaluations_are_lines_of_one_table() -> None:
    table, lines = EvaluationTable(), list[str]()
    for step, mean in ((0, 0.5), (5, -12.25), (1000, 0.0)):
        scores = {"oracle": torch.full((4,), mean), "a_reward_with_a_long_name": torch.tensor([0.0, 1.0, 2.0, 3.0])}
        one = Evaluation(["a", "a", "b", "b"], [0, 1, 2, 3], torch.rand(4, 3, 8, 8), scores)
        lines += table.line(step, one, title="held-out prompts").split("\n")
    assert lines[0] == "4 images of held-out prompts"
    assert len(lines) == 5
    assert len({len(line) for line in lines[1:]}) == 1
    assert re.split(r"  +", lines[1].strip()) == ["step", "oracle", "a_reward_with_a_long_name", "diversity"]
    assert [re.split(r"  +", line.strip())[1] for line in lines[2:]] == [
        "0.500 ± 0.000", "-12.250 ± 0.000", "0.000 ± 0.000"
    ]  # fmt: skip


def test_colours_need_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    main, child = pty.openpty()
    with os.fdopen(child, "w") as terminal:
        assert has_colours(terminal)
        assert not has_colours(io.StringIO())
        monkeypatch.setenv("NO_COLOR", "1")
        assert not has_colours(terminal)
        monkeypatch.setenv("NO_COLOR", "")
        monkeypatch.setenv("TERM", "dumb")
        assert not has_colours(terminal)
    os.close(main)
    assert coloured("text", None) == "text"


def test_a_pipe_gets_no_colours() -> None:
    script = "from rlhf_t2i.output.terminal import has_colours; print(has_colours())"
    environment = {**os.environ, "TERM": "xterm"}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
