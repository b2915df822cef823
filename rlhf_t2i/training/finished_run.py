"""Read the folder of a finished run, for publication and comparison; raise an error where it is incomplete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from rlhf_t2i.output.json_files import read_typed
from rlhf_t2i.output.run_folder import (
    CAPTIONS,
    CONFIG,
    IMAGES,
    REPORT,
    REWARD_HISTORY,
    REWARD_METRICS,
    REWARD_MODEL_CONFIG,
    RUN_INFO,
    WEIGHT_FILES,
    WeightKind,
    image_grid,
    read_captions,
    read_config,
    read_reward_history,
    read_reward_metrics,
    read_run_info,
)
from rlhf_t2i.settings.image_size import image_size
from rlhf_t2i.shapes.names import default_resolution
from rlhf_t2i.training.metrics import Row, by_step, evaluations_to_export, read_metrics, trained_rewards


class _Index(TypedDict):
    """Types of the index of sharded weights."""

    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """Contents of the folder of a finished run, of a policy or of a reward model."""

    folder: Path
    kind: WeightKind
    info: dict[str, Any]
    """run.json: recipe, command, commit, versions."""
    config: dict[str, Any]
    rows: list[Row]
    """metrics.jsonl of a policy; empty for a reward model."""
    reward_metrics: dict[str, list[Row]]
    """metrics.json of a reward model, by data set; empty for a policy."""
    history: list[Row]
    """history.json of a reward model, its training log; empty for a policy."""

    @property
    def weights(self) -> Path:
        """Folder of the exported weights."""
        return self.folder / self.kind

    @property
    def is_full_denoiser(self) -> bool:
        """True if the exported weights are the full denoiser, not LoRA adapters or a reward model."""
        return self.kind in ("unet", "transformer")

    @property
    def num_evaluation_steps(self) -> int:
        """Denoising steps of evaluation images; older runs have no setting for it."""
        return self.config.get("num_evaluation_steps") or self.config["num_denoising_steps"]

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of images in pixels; None is the model's default, which older runs have not recorded."""
        chosen = image_size(self.config)
        size = default_resolution(self.config["model"]) if chosen is None else chosen
        if size is None:
            return tuple(self.info["image_size"]) if "image_size" in self.info else None
        return (size, size) if isinstance(size, int) else size

    @property
    def evaluations(self) -> list[Row]:
        """Rows of the evaluations: the first is before training, the last of the exported weights."""
        return evaluations_to_export(self.rows)

    @property
    def trained_on(self) -> list[str]:
        """Names of the rewards trained on."""
        return trained_rewards(self.rows)

    @property
    def grids(self) -> list[Path]:
        """Image grids of the first evaluation and of that of the exported weights."""
        return [image_grid(self.folder, self.evaluations[i]["step"]) for i in (0, -1)]

    @property
    def captions(self) -> dict[str, Any]:
        """Prompts and seeds of the images in each grid."""
        return read_captions(self.folder)


def read_run(folder: Path) -> FinishedRun:
    """Read the folder of a finished run.

    Raises FileNotFoundError, naming what is missing, for a folder that is not a run or not a finished one, and
    ValueError for one written by another version or with damaged files.
    """
    for name in (RUN_INFO, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no {name}.")
    info, config = read_run_info(folder), read_config(folder)
    _check_version(folder, info)
    unfinished = f"The run is not finished: continue it with --resume --run_folder {folder}"
    kind = next((kind for kind in get_args(WeightKind) if _weight_files(folder, kind)), None)
    if kind is None:
        raise FileNotFoundError(
            f"{folder} has no weights of the kinds that can be published: {', '.join(get_args(WeightKind))}. "
            f"{unfinished}, or name the folder of a training run."
        )
    for path in _weight_files(folder, kind):
        check_safetensors(path)
    _check_config(folder, config, kind)
    if kind == "reward_model":
        _check_files(folder, [REWARD_MODEL_CONFIG, REWARD_METRICS, REWARD_HISTORY], unfinished)
        return FinishedRun(folder, kind, info, config, [], read_reward_metrics(folder), read_reward_history(folder))
    run = FinishedRun(folder, kind, info, config, read_metrics(folder), {}, [])
    done = max((row["step"] for row in by_step(run.rows, "train")), default=0)
    num_evaluations = len(by_step(run.rows, "evaluation"))
    if num_evaluations < 2 or (done < config["num_steps"] and config["early_stop_reward"] is None):
        raise FileNotFoundError(
            f"{folder} has {done} of {config['num_steps']} steps and {num_evaluations} evaluations, of which it "
            f"needs at least 2: its weights are not those evaluated last. {unfinished}"
        )
    files = [str(path.relative_to(folder)) for path in run.grids]
    _check_files(folder, [*files, f"{IMAGES}/{CAPTIONS}", REPORT], unfinished)
    return run


def _weight_files(folder: Path, kind: WeightKind) -> list[Path]:
    """Return the weight file of a kind, or the shards that its index names; empty if the run has none."""
    path = folder / kind / WEIGHT_FILES[kind]
    index = path.with_name(f"{path.name}.index.json")
    if index.is_file():
        return sorted({path.with_name(shard) for shard in read_typed(index, _Index)["weight_map"].values()})
    return [path] if path.is_file() else []


def check_safetensors(path: Path) -> None:
    """Raise ValueError unless a safetensors file is complete."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The weights {path} are damaged: {error}.") from error


def _check_version(folder: Path, info: Any) -> None:
    """Raise ValueError unless the run was written by this version; patch releases may differ."""
    if missing := {"recipe", "command", "started", "versions"} - (info.keys() if isinstance(info, dict) else set()):
        raise ValueError(
            f"{folder / RUN_INFO} lacks {', '.join(sorted(missing))}: another version of rlhf-t2i wrote it."
        )
    written = info["versions"].get("rlhf-t2i")
    try:
        own = version("rlhf-t2i")
    except PackageNotFoundError:
        return
    if written is not None and written.split(".")[:2] != own.split(".")[:2]:
        raise ValueError(
            f"{folder} was written by rlhf-t2i {written}, and this is {own}. Publish it with the version that wrote it"
            f"{', of commit ' + info['git_commit'] if info.get('git_commit') else ''}."
        )


def _check_config(folder: Path, config: Any, kind: WeightKind) -> None:
    needed = {"backbone", "train_data"} if kind == "reward_model" else {
        "model", "num_steps", "evaluation_prompts", "early_stop_reward", "num_denoising_steps", "guidance_scale",
        "evaluation_eta",
    }  # fmt: skip
    if missing := needed - (config.keys() if isinstance(config, dict) else set()):
        raise ValueError(f"{folder / CONFIG} lacks {', '.join(sorted(missing))}: another version of rlhf-t2i wrote it.")


def _check_files(folder: Path, files: Sequence[str], hint: str) -> None:
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}. {hint}")
