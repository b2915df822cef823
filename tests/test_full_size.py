"""benchmarks/full_size.py on the CPU, so that it is known to work when a GPU is at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import full_size
from benchmarks.full_size_parts import Machine, score_rows

CPU = torch.device("cpu")


def test_a_row_that_fails_is_written_and_the_next_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_of(name: str, machine: Machine) -> Iterator[dict[str, Any]]:
        yield {"value": 1}
        if name == "bad":
            raise torch.OutOfMemoryError("there is no room")

    monkeypatch.setattr(full_size, "rows_of", rows_of)
    found = full_size.measure(["bad", "good"], Machine(CPU, {}), tmp_path, minutes=10)
    assert [(row["row"], "failed" in row) for row in found] == [("bad", False), ("bad", True), ("good", False)]
    assert "OutOfMemoryError: there is no room" in found[1]["failed"]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == found


def test_no_row_starts_when_the_time_is_over(tmp_path: Path) -> None:
    [row] = full_size.measure(["sd15"], Machine(CPU, {}), tmp_path, minutes=-1)
    assert row["left_out"]


def test_all_rows_of_the_order_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in full_size.ORDER:
        full_size.rows_of(name, Machine(CPU, {}))  # a generator, of which nothing runs yet
    with pytest.raises(ValueError, match="'other' is no row"):
        full_size.rows_of("other", Machine(CPU, {}))


def test_scores_of_a_qwen_of_random_weights_are_timed() -> None:
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "fullatt_block_indexes": [1]}
    tiny = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "vision": vision,
    }  # fmt: skip
    [row] = score_rows(Machine(CPU, {}), tiny, sides=(56,), batches=(2,))
    assert row["seconds"] > 0
    assert row["preparing"] > 0


@pytest.mark.slow
def test_a_training_step_of_stable_diffusion_at_full_size_is_measured(tmp_path: Path) -> None:
    """At 64 pixels, in float32."""
    rate, row = full_size.main(["--rows", "rate", "smallest", "--output", str(tmp_path)])
    assert rate["tflops"] > 0
    assert "failed" not in row, row
    assert (row["replay_error"], row["images"]) == (0.0, 2)
    assert row["gradient_norm"] > 0
