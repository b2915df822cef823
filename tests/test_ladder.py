"""The ladder of docs/many_gpus.md: its switches add up, one step serves several, the grid has the first that fits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from benchmarks import ladder


def test_each_rung_adds_a_switch_and_those_that_add_nothing_are_left_out() -> None:
    rungs = ladder.rungs_of("SD 1.5", "policy gradient")
    assert list(rungs) == ["as it is", "away", "checkpointing", "int8", "nf4"]
    assert rungs["as it is"].gradient_checkpointing is False
    last = rungs["nf4"]
    assert (last.gradient_checkpointing, last.quantization, last.cache_embeddings) == (True, "nf4", "embeddings")
    assert list(ladder.rungs_of("SDXL", "Diffusion-DPO, all weights")) == ["as it is", "away", "8-bit AdamW"]
    assert list(ladder.rungs_of("FLUX.1", "FK steering")) == ["as it is", "away", "int8", "nf4"]


def test_a_step_runs_once_for_switches_that_are_computed_and_known_plans_are_not_made_again() -> None:
    runs, rows = list[Any](), list[ladder.Row]()

    def rehearse(main: Any, config: Any) -> Any:
        del main
        runs.append(config)
        return lambda config: SimpleNamespace(peak=30e9, peaks={"update": 30e9})

    climb = {"known": rows, "write": rows.append, "rehearse": rehearse}
    ladder.climb("SD 1.5", "policy gradient", **climb)
    assert [run.gradient_checkpointing for run in runs] == [False, True]
    assert [row["switch"] for row in rows] == ["as it is", "away", "checkpointing", "int8", "nf4"]
    assert {(row["gigabytes"], row["phase"]) for row in rows} == {(30.0, "update")}
    ladder.climb("SD 1.5", "policy gradient", **climb)
    assert (len(runs), len(rows)) == (2, 5)


def test_the_grid_has_the_first_switch_that_fits_in_nine_tenths_of_a_gpu() -> None:
    peaks = {"as it is": 23.3, "away": 15.4, "int8": 12.0}
    rows = [{"model": "M", "method": "D", "switch": name, "gigabytes": peak} for name, peak in peaks.items()]
    grid = ladder.table(rows).splitlines()[-1]
    assert grid == "| M | D | – | – | away (15.4) | away (15.4) | as it is (23.3) | as it is (23.3) |"
