"""Reward training: its objective, its trained parameters, its checkpoints, and the recipe."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from recipes import train_reward_model
from reward_model.checkpoint import WEIGHTS_NAME, adapter_tensors, read_config
from reward_model.checkpoint_files import newest_checkpoint
from reward_model.datasets.refill import Refill
from reward_model.losses import Objective
from reward_model.model import GROUPS
from reward_model.training import Collator, RewardModelTrainer
from reward_model.types import LabelledImage, PreferencePair, Record
from tests import processes
from tests.reward_models import backbone_folder, fresh_model

ROOT = Path(__file__).parent.parent
NO_TIES, NOTHING = torch.zeros(0, dtype=torch.bool), torch.zeros(0)


# --- data -----------------------------------------------------------------------------------------


def draw(path: Path, colour: tuple[int, int, int], *, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 60, (28, 28, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs.jsonl (bright beats dark), mixed.jsonl (also ties and labels) and published.json."""
    folder = tmp_path_factory.mktemp("data")
    rows: list[dict[str, Any]] = []
    for i in range(24):
        draw(folder / f"bright{i}.png", (190, 180, 170), seed=i)
        draw(folder / f"dark{i}.png", (20, 10, 30), seed=100 + i)
        rows.append({"prompt": f"a red fox {i % 6}", "winner": f"bright{i}.png", "loser": f"dark{i}.png"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixed = [
        *rows[:8],
        *({"prompt": f"a tie {i}", "tie": [f"bright{i}.png", f"bright{i + 1}.png"]} for i in range(4)),
        *({"prompt": f"a label {i}", "image": f"bright{i}.png", "label": 1} for i in range(4)),
        *({"prompt": f"a label {i}", "image": f"dark{i}.png", "label": 0} for i in range(4)),
    ]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    published = [
        {"prompt_id": str(i), "prompt": f"a red fox {i % 6}", "chosen_path": f"bright{i}.png", "c_rate": 6,
         "reject_path": f"dark{i}.png", "r_rate": 2}
        for i in range(24)
    ]  # fmt: skip
    (folder / "published.json").write_text(json.dumps(published))
    return folder


@pytest.fixture
def streamed(data: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of 200,000 pairs of the same 48 images, read as those of a bucket: by ranges, through fsspec."""
    path = data / "streamed.jsonl"
    if not path.exists():
        images = [(f"bright{i}.png", f"dark{i}.png") for i in range(24)]
        rows = (
            {"prompt": f"a red fox {i}", "winner": images[i % 24][0], "loser": images[i % 24][1]}
            for i in range(200_000)
        )
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(data / "cache"))
    return f"file://{path}"


def command(data: Path, folder: Path, *, processes: int = 1, launcher: Path | None = None, **values: Any) -> list[str]:
    """Return the command of the recipe on the tiny LLaVA."""
    settings: dict[str, Any] = {
        "backbone": backbone_folder("llava"),
        "train_data": data / "pairs.jsonl", "validation_data": data / "pairs.jsonl",
        "lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2, "microbatch_size": 4, "accumulation_steps": 1,
        "num_steps": 8, "evaluate_every": 4, "patience": 0, "num_cpu_threads": 1, "run_folder": folder,
        **values,
    }  # fmt: skip
    config = launcher or ROOT / "accelerate_configs" / ("ddp.yaml" if processes > 1 else "single.yaml")
    launch = ["--config_file", str(config), "--num_processes", str(processes)]
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "accelerate.commands.launch", *launch, "recipes/train_reward_model.py", *flags]


def run(arguments: list[str], *, fails: bool = False) -> str:
    result = processes.run(arguments, env={"TRANSFORMERS_VERBOSITY": "error"})
    output = result.stdout + result.stderr
    assert (result.returncode != 0) == fails, output
    return output


def trained_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "reward_model" / WEIGHTS_NAME)


# --- validation -------------------------------------------------------------------------------


def test_training_is_interrupted_for_a_sample_of_the_validation_records(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn once, so that the validations of a run, and of its resume, are comparable."""
    drawn: list[list[str]] = []

    def stop(*_: Any, validation: Sequence[Record], **__: Any) -> None:
        drawn.append([record.where for record in validation])
        raise InterruptedError

    monkeypatch.setattr(train_reward_model, "RewardModelTrainer", stop)
    pairs = str(data / "pairs.jsonl")
    for name, most in (("a", 5), ("b", 5), ("all", 24)):
        config = train_reward_model.Config(
            backbone=str(backbone_folder("llava")), train_data=pairs, validation_data=pairs,
            max_validation_records=most, num_cpu_threads=1, run_folder=str(tmp_path / name),
        )  # fmt: skip
        with pytest.raises(InterruptedError):
            train_reward_model.main(config)
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 5
    assert [where for where in drawn[2] if where in drawn[0]] == drawn[0]
    assert len(drawn[2]) == 24


# --- the objective ----------------------------------------------------------------------------


def test_bradley_terry_over_a_batch_by_hand() -> None:
    """Two pairs, one of them ranked correctly, and a bad image that is classified as good."""
    outputs = torch.tensor([[0.3], [0.0], [0.1], [0.2], [2.0]])
    loss, correct = Objective()(outputs, torch.tensor([False, False]), torch.zeros(2), torch.tensor([0.0]))
    expected = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(2.0)), math.log1p(math.exp(2.0))]
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert correct.tolist() == [1.0, 0.0, 0.0]


def test_cross_entropy_treats_a_pair_as_two_labels() -> None:
    outputs = torch.tensor([[1.0], [-0.5]])
    loss, _ = Objective(loss="cross_entropy", temperature=1.0)(outputs, torch.tensor([False]), torch.zeros(1), NOTHING)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-0.5)))


def test_general_preference_over_a_batch_by_hand() -> None:
    outputs = torch.tensor([[1.0, 0.0], [0.0, 0.1]])
    loss, correct = Objective(loss="general_preference")(outputs, torch.tensor([False]), torch.zeros(1), NOTHING)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)))
    assert correct.tolist() == [1.0]


def test_a_rating_gap_is_a_margin() -> None:
    """With a margin of 0.5 for each unit, a gap of 2 subtracts 1 from the log-odds."""
    outputs = torch.tensor([[0.3], [0.0]])
    loss, _ = Objective(margin_per_rating=0.5)(outputs, torch.tensor([False]), torch.tensor([2.0]), NOTHING)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2.0)))


def test_a_tie_has_no_accuracy_and_pulls_scores_together() -> None:
    outputs = torch.tensor([[0.3], [0.0]], requires_grad=True)
    loss, correct = Objective(tie_width=0.5)(outputs, torch.tensor([True]), torch.zeros(1), NOTHING)
    loss.backward()
    assert correct.isnan().all()
    assert outputs.grad is not None
    assert outputs.grad[0] > 0 > outputs.grad[1]


PAIR = PreferencePair(Path("a.png"), Path("b.png"), "a fox", "a fox", where="data.jsonl:3")
TIE = PreferencePair(Path("a.png"), Path("b.png"), "a fox", "a fox", tie=True, where="data.jsonl:4")
LABEL = LabelledImage(Path("a.png"), "a fox", 1, where="data.jsonl:5")


@pytest.mark.parametrize(
    ("objective", "record", "words"),
    [
        (Objective(loss="general_preference"), LABEL, "data.jsonl:5 is a label"),
        (Objective(loss="cross_entropy"), TIE, "data.jsonl:4 is a tie"),
        (Objective(readout="prompt_likelihood"), LABEL, "data.jsonl:5 is a label; readout prompt_likelihood compares"),
        (Objective(tie_width=0.0), TIE, "tie_width > 0"),
    ],
)
def test_records_that_a_loss_cannot_use_are_refused(objective: Objective, record: Record, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        objective.check([PAIR, record])


def test_rows_are_winners_then_losers_then_labels(data: Path) -> None:
    model = fresh_model("llava")
    records: list[Record] = [
        LabelledImage(data / "dark0.png", "dark", 0),
        PreferencePair(data / "bright1.png", data / "dark1.png", "w", "l", rating_gap=2.0),
    ]
    batch = Collator(model, records, Refill(2, skipped=None))([{"record": 0}, {"record": 1}])
    assert len(batch["input_ids"]) == 3
    brightness = batch["pixel_values"].mean((1, 2, 3))
    assert brightness[0] > brightness[1]
    assert batch["tie"].tolist() == [False]
    assert batch["gap"].tolist() == [2.0]
    assert batch["label"].tolist() == [0.0]


def test_an_image_that_cannot_be_read_in_training_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    record = LabelledImage(tmp_path / "broken.png", "x", 1, where="data.jsonl:9")
    with pytest.raises(ValueError, match=r"data\.jsonl:9: .*broken\.png"):
        Collator(fresh_model("llava"), [record], Refill(1, skipped=None))([{"record": 0}])


def test_unusable_records_are_replaced_and_written_whoever_meets_them(data: Path, tmp_path: Path) -> None:
    """The replacement depends on the records alone, so it is the same in every process, and a batch keeps its size."""
    (tmp_path / "broken.png").write_bytes(b"nothing")
    good = [PreferencePair(data / f"bright{i}.png", data / f"dark{i}.png", f"{i}", f"{i}") for i in range(4)]
    bad = PreferencePair(data / "bright0.png", tmp_path / "broken.png", "x", "x", where="data.jsonl:9")
    long = PreferencePair(data / "bright0.png", data / "dark0.png", "fox " * 40_000, "x", where="data.jsonl:10")
    records, model = [*good[:2], bad, long, *good[2:]], fresh_model("llava")

    def batch_of(*rows: int, skipped: Path) -> dict[str, Tensor]:
        return Collator(model, records, Refill(6, skipped=skipped))([{"record": row} for row in rows])

    expected = batch_of(1, 4, 4, 5, skipped=tmp_path / "none")
    for log in ("first", "second"):
        found = batch_of(1, 2, 3, 5, skipped=tmp_path / log)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        lines = sorted(map(json.loads, (tmp_path / log).read_text().splitlines()), key=lambda line: len(line["where"]))
        assert [line["where"] for line in lines] == ["data.jsonl:9", "data.jsonl:10"]
        assert "broken.png" in lines[0]["reason"]
        assert "tokens" in lines[1]["reason"]
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"2 of the 2 records that training met .* see .*log"):
        Collator(model, records, Refill(2, 2, 2, skipped=tmp_path / "log"))([{"record": 2}, {"record": 3}])


# --- the trainer ----------------------------------------------------------------------------------


def trainer_of(data: Path, tmp_path: Path, *, rates: dict[str, float] | None = None, **more: Any) -> RewardModelTrainer:
    from trl import RewardConfig

    args = RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_dropout=False, max_length=None,
        remove_unused_columns=False, max_steps=3, per_device_train_batch_size=4, activation_checkpointing=False,
        save_strategy="no", learning_rate=1e-2, bf16=False,
    )  # fmt: skip
    pairs = [PreferencePair(data / f"bright{i}.png", data / f"dark{i}.png", "x", "x") for i in range(8)]
    rates = rates or {"lora": 1e-2, "projector": 2e-3, "skip_ca": 3e-3, "head": 4e-3}
    return RewardModelTrainer(
        fresh_model("llava"), objective=Objective(), training=pairs, validation=[], args=args, learning_rates=rates,
        **more,
    )  # fmt: skip


def test_each_group_has_its_own_learning_rate(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path)
    groups = trainer.create_optimizer().param_groups
    assert {g["name"]: g["lr"] for g in groups} == {"lora": 1e-2, "projector": 2e-3, "skip_ca": 3e-3, "head": 4e-3}
    optimised = {id(p) for g in groups for p in g["params"]}
    assert optimised == {id(p) for p in trainer.reward_model.parameters() if p.requires_grad}


def test_a_killed_process_that_loads_images_is_named(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path)
    trainer.args.dataloader_num_workers = 1
    trainer.data_collator = lambda batch: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(ValueError, match=r"^A process that loads images ended: .*fewer num_workers \(now 1\), or 0"):
        trainer.train_from(None)


def test_all_groups_move_and_the_backbone_does_not(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path)
    reward_model = trainer.reward_model
    trained = {id(p) for named in reward_model.groups(reward_model.active).values() for p in named.values()}
    before = {name: p.detach().clone() for name, p in reward_model.named_parameters()}
    trainer.train()
    for name, parameter in reward_model.named_parameters():
        assert torch.equal(parameter, before[name]) != (id(parameter) in trained), name


def test_lora_only_trains_only_the_lora(data: Path, tmp_path: Path) -> None:
    """As the published optimiser."""
    trainer = trainer_of(data, tmp_path, lora_only=True)
    before = {k: v.clone() for k, v in adapter_tensors(trainer.reward_model, trainer.reward_model.active).items()}
    trainer.train()
    for key, tensor in adapter_tensors(trainer.reward_model, trainer.reward_model.active).items():
        assert torch.equal(tensor, before[key]) != key.startswith("lora."), key


def test_a_resumed_training_takes_its_own_learning_rates(data: Path, tmp_path: Path) -> None:
    """The schedule is linear over 4 steps, of which 2 are done."""
    first = trainer_of(data, tmp_path)
    first.create_optimizer_and_scheduler(num_training_steps=4)
    for _ in range(2):
        first.optimizer.step()
        first.lr_scheduler.step()
    first._save_optimizer_and_scheduler(str(tmp_path))
    for rates, expected in ((None, [5e-3, 1e-3, 1.5e-3, 2e-3]), (dict.fromkeys(GROUPS, 8.0), [4.0] * 4)):
        resumed = trainer_of(data, tmp_path, rates=rates)
        resumed.create_optimizer_and_scheduler(num_training_steps=4)
        resumed._load_optimizer_and_scheduler(str(tmp_path))
        assert [group["lr"] for group in resumed.optimizer.param_groups] == expected
        resumed.lr_scheduler.step()
        assert [group["lr"] for group in resumed.optimizer.param_groups] == [rate / 2 for rate in expected]


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(data: Path, streamed: str, tmp_path: Path) -> None:
    """kill -9, here after the second checkpoint; with dropout, so that the random state must resume too."""
    steps = {"num_steps": 24, "evaluate_every": 4, "lora_dropout": 0.2, "patience": 4, "train_data": streamed}
    run(command(data, tmp_path / "whole", **steps))
    killed = command(data, tmp_path / "killed", **steps)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.Popen(
        killed, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not (tmp_path / "killed" / "checkpoints" / "checkpoint-8" / "complete.json").exists():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "reward_model").exists(), "it had finished before it was killed"
    output = run([*killed, "--resume", "true"])
    assert "Resuming from" in output
    whole, resumed = trained_weights(tmp_path / "whole"), trained_weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, resumed[key]), key
    shutil.rmtree(
        tmp_path / "whole" / "reward_model"
    )  # as if killed after the last checkpoint, before the reward model was written
    output = run([*command(data, tmp_path / "whole", **steps), "--resume", "true"])
    assert all(torch.equal(tensor, whole[key]) for key, tensor in trained_weights(tmp_path / "whole").items())


@pytest.mark.slow
def test_two_processes_train_the_same_weights_as_one(data: Path, streamed: str, tmp_path: Path) -> None:
    """Two processes of 4 pairs, or one that accumulates 2 batches of 4: the same up to rounding; of two sources."""
    same = {
        "train_data": f"{streamed},{data / 'pairs.jsonl'}", "data_weights": "3,1", "lora_dropout": 0.0,
        "num_steps": 3, "evaluate_every": 3, "learning_rate": 1e-3,
    }  # fmt: skip
    run(command(data, tmp_path / "one", accumulation_steps=2, **same))
    one = trained_weights(tmp_path / "one")
    for mode in ("ddp", "deepspeed_zero2", "deepspeed_zero3"):
        launcher = ROOT / "accelerate_configs" / f"{mode}.yaml"
        run(command(data, tmp_path / mode, processes=2, launcher=launcher, **same))
        other = trained_weights(tmp_path / mode)
        for key, tensor in one.items():
            assert_close(tensor, other[key], rtol=1e-3, atol=1e-5, msg=f"{mode}, {key}")


@pytest.mark.slow
def test_images_in_a_table_train_the_same_weights_in_two_processes_with_workers(data: Path, tmp_path: Path) -> None:
    """Row groups of 8 rows, of which one has a broken image that is skipped; with and without workers."""
    rows = [
        {
            "prompt": f"a red fox {i % 6}",
            "winner": (data / f"bright{i}.png").read_bytes() if i != 5 else b"broken",
            "loser": (data / f"dark{i}.png").read_bytes(),
        }
        for i in range(24)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet", row_group_size=8)
    same = {
        "train_data": tmp_path / "pairs.parquet", "on_bad_record": "skip", "lora_dropout": 0.0, "num_steps": 3,
        "evaluate_every": 3, "learning_rate": 1e-3,
    }  # fmt: skip
    output = run(command(data, tmp_path / "one", accumulation_steps=2, **same))
    assert "1 records were skipped; see" in output
    run(command(data, tmp_path / "two", processes=2, num_workers=1, **same))
    (line,) = {file.read_text() for file in (tmp_path / "two").glob("skipped*.jsonl")}
    assert json.loads(line)["where"] == f"{tmp_path / 'pairs.parquet'}:ROW 6"
    one, two = trained_weights(tmp_path / "one"), trained_weights(tmp_path / "two")
    for key, tensor in one.items():
        assert_close(tensor, two[key], rtol=1e-3, atol=1e-5, msg=key)


# --- the recipe -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_reports_and_keeps_the_best_weights(data: Path, tmp_path: Path) -> None:
    output = run(command(data, tmp_path / "run", num_steps=24, test_data=data / "published.json"))
    for word in ("lora", "projector", "skip_ca", "head", "trained", "frozen", "published", "accuracy_ties_wrong"):
        assert word in output
    assert "visual tokens of an image: 512 x 512: 4, 768 x 768: 4, 1024 x 1024: 4" in output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["published"][0]["value"] == 1.0
    config = read_config(tmp_path / "run" / "reward_model")
    assert config.score_std is not None
    assert config.score_std > 0
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints", report=pytest.fail)
    assert newest is not None
    state = json.loads((newest / "trainer_state.json").read_text())
    best = load_file(Path(state["best_model_checkpoint"]) / WEIGHTS_NAME)
    assert all(torch.equal(tensor, best[key]) for key, tensor in trained_weights(tmp_path / "run").items())
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["lora_rank"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "loss", "more"),
    [
        ("published.json", "general_preference", {"margin_per_rating": 0.1}),
        ("published.json", "cross_entropy", {"skip_ca": "false", "validation_data": ""}),
        ("published.json", "bradley_terry", {"readout": "prompt_likelihood"}),
        ("mixed.jsonl", "bradley_terry", {"gradient_checkpointing": "true", "skip_ca_heads": 4}),
    ],
)
def test_every_format_and_loss_trains(data: Path, tmp_path: Path, file: str, loss: str, more: dict[str, Any]) -> None:
    small = {"train_data": data / file, "loss": loss, "num_steps": 2, "evaluate_every": 2, **more}
    if not small.get("validation_data", True):
        small |= {"validation_data": "null", "validation_fraction": 0.3}
    run(command(data, tmp_path / "run", **small))
    config = read_config(tmp_path / "run" / "reward_model")
    assert config.head == ("general_preference" if loss == "general_preference" else "scalar")
    assert (config.tie_width > 0) == (file == "mixed.jsonl")


@pytest.mark.slow
def test_a_bad_record_stops_the_run_or_is_skipped_and_logged(data: Path, tmp_path: Path) -> None:
    lines = (data / "pairs.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace("bright3", "missing")
    for image in data.glob("*.png"):
        shutil.copy(image, tmp_path)
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    bad = {"train_data": tmp_path / "bad.jsonl", "num_steps": 1, "evaluate_every": 1}
    output = run(command(data, tmp_path / "stopped", **bad), fails=True)
    assert "bad.jsonl:4" in output
    assert "missing.png" in output
    lines[7] = lines[7].replace("a red fox", "a red <image> fox")  # a special token of the backbone
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    epoch = {"num_steps": 6, "evaluate_every": 6}  # an image or prompt that cannot be used shows when it is met
    run(command(data, tmp_path / "skipped", on_bad_record="skip", **bad | epoch))
    skipped = [json.loads(line) for line in (tmp_path / "skipped" / "skipped.jsonl").read_text().splitlines()]
    assert [row["where"].rpartition(":")[2] for row in skipped] == ["4", "8"]
    assert "<image>" in skipped[1]["reason"]
