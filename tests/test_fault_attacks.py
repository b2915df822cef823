"""The command that attacks runs, files and servers: one try of each quick kind, and what it counts."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import processes
from tests.launch import ROOT


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the command, whose parts lie beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from importlib import import_module

    return import_module("faults")


def test_a_try_is_made_once_and_a_failure_is_counted_and_named(
    faults: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, said = list[int](), list[str]()

    def attempt(work: Path, index: int, rng: random.Random) -> object:
        tried.append(index)
        return faults.Outcome(index != 1, f"number {rng.random()}")

    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "pairs.jsonl").touch()
    monkeypatch.setitem(faults.PARTS, "kills", faults.Part("a title", attempt, 3))
    faults.attack("kills", tmp_path, tries=2, seed=0, say=said.append)
    first = (tmp_path / "kills.jsonl").read_text()
    faults.attack("kills", tmp_path, tries=4, seed=0, say=said.append)
    assert tried == [0, 1, 2, 3]
    assert (tmp_path / "kills.jsonl").read_text().startswith(first)
    assert [line.split(": ")[0] for line in said] == ["FAILED kills 1"]
    assert faults.table(tmp_path).splitlines()[2:] == ["| a title | 4 | 3 | 1 |"]


@pytest.mark.slow
def test_one_try_of_each_quick_kind_is_survived() -> None:
    names = ("kills", "single_kills", "single_disk", "annotation", "bits", "requests", "half_open")
    parts = [option for name in names for option in ("--part", name)]
    result = processes.run([sys.executable, "benchmarks/faults.py", *parts, "--tries", "1"])
    assert result.returncode == 0, result.stdout + result.stderr
    survived = [line for line in result.stdout.splitlines() if line.endswith("| 0 |")]
    assert len(survived) == len(names), result.stdout
