"""A run folder, read for those who publish or compare it: whole and of this version, or an error says what is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from safetensors import SafetensorError, safe_open

from rlhf_t2i.shapes.names import TOY_RESOLUTION as PIXELS
from rlhf_t2i.training.metrics import Row, by_step, read_metrics

Kind = Literal["lora", "unet", "transformer", "reward_model"]
WEIGHTS: dict[Kind, str] = {
    "lora": "pytorch_lora_weights.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "reward_model": "llava_reward.safetensors",
}
"""What each kind of run leaves, in a folder that is called like the kind; large ones lie in parts, with an index."""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a run folder says of itself."""

    folder: Path
    kind: Kind
    facts: dict[str, Any]
    """run.json: recipe, command, commit, versions."""
    config: dict[str, Any]
    rows: list[Row]
    """metrics.jsonl; none for a judge."""
    measured: dict[str, list[Row]]
    """metrics.json of a judge, by the name of each data set; none for a painter."""
    history: list[Row]
    """history.json of a judge: what was logged at which step; none for a painter."""

    @property
    def weights(self) -> Path:
        """The folder of what was learnt."""
        return self.folder / self.kind

    @property
    def is_whole_denoiser(self) -> bool:
        """Whether all of the painter's network was trained, and not only adapters."""
        return self.kind in ("unet", "transformer")

    @property
    def num_evaluation_steps(self) -> int:
        """Denoising steps of the images that were looked at. Older runs have no setting of their own for it."""
        return self.config.get("num_evaluation_steps") or self.config["num_denoising_steps"]

    @property
    def resolution(self) -> int | None:
        """Height and width of its images, if not what the model was made for; older runs have no such setting."""
        chosen = self.config.get("resolution")
        return PIXELS if chosen is None and self.config.get("model") == "shapes-flow" else chosen

    @property
    def evaluations(self) -> list[Row]:
        """The first is of before training, the last of the weights that are exported."""
        return by_step(self.rows, "evaluation")

    @property
    def trained_on(self) -> list[str]:
        """The rewards that the painter learnt from, as training rows name them."""
        keys = [key for row in by_step(self.rows, "train") for key in row if key.startswith("rewards/")]
        return [key.removeprefix("rewards/") for key in dict.fromkeys(keys)]

    @property
    def strips(self) -> list[Path]:
        """The images of the first and of the last evaluation."""
        steps = [self.evaluations[i]["step"] for i in (0, -1)]
        return [self.folder / "images" / f"step_{step:06d}.png" for step in steps]

    @property
    def captions(self) -> dict[str, Any]:
        """Prompts and seeds of the images on each strip."""
        return json.loads((self.folder / "images" / "captions.json").read_text(encoding="utf-8"))


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run of a painter or a judge.

    Raises FileNotFoundError, naming what is missing, for another folder or a run that is not finished, and ValueError
    for one that another version wrote or whose files are damaged.
    """
    for name in ("run.json", "config.yaml"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not the folder of a run: it holds no {name}.")
    facts, config = _json(folder / "run.json"), yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    _check_version(folder, facts)
    unfinished = f"Its run is not finished: go on with it by --resume --run_folder {folder}"
    kind = next((kind for kind in get_args(Kind) if _weights(folder, kind)), None)
    if kind is None:
        raise FileNotFoundError(
            f"{folder} holds no weights of the kinds that can be published: {', '.join(get_args(Kind))}. {unfinished}, "
            f"or name the folder of a run that trains."
        )
    for path in _weights(folder, kind):
        check_safetensors(path)
    _check_config(folder, config, kind)
    if kind == "reward_model":
        _check_files(folder, ["reward_model/llava_reward.json", "metrics.json", "history.json"], unfinished)
        measured, history = _json(folder / "metrics.json"), _json(folder / "history.json")
        return FinishedRun(folder, kind, facts, config, [], measured, history)
    run = FinishedRun(folder, kind, facts, config, read_metrics(folder), {}, [])
    done = max((row["step"] for row in by_step(run.rows, "train")), default=0)
    if len(run.evaluations) < 2 or (done < config["num_steps"] and config["early_stop_reward"] is None):
        raise FileNotFoundError(
            f"{folder} tells of {done} of {config['num_steps']} steps and of {len(run.evaluations)} evaluations, which "
            f"must be two at least: its weights are not what was evaluated last. {unfinished}"
        )
    files = [str(path.relative_to(folder)) for path in run.strips]
    _check_files(folder, [*files, "images/captions.json", "report.html"], unfinished)
    return run


def _weights(folder: Path, kind: Kind) -> list[Path]:
    """The one file of what was learnt, or the parts that its index names; none if the run left nothing of the kind."""
    whole = folder / kind / WEIGHTS[kind]
    index = whole.with_name(f"{whole.name}.index.json")
    if index.is_file():
        return sorted({whole.with_name(part) for part in _json(index)["weight_map"].values()})
    return [whole] if whole.is_file() else []


def check_safetensors(path: Path) -> None:
    """ValueError unless all of a file of weights is there."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The weights {path} are damaged: {error}.") from error


def _check_version(folder: Path, facts: Any) -> None:
    """Patches may differ; what else a version changes, this one cannot know."""
    if missing := {"recipe", "command", "started", "versions"} - (facts.keys() if isinstance(facts, dict) else set()):
        raise ValueError(
            f"{folder / 'run.json'} lacks {', '.join(sorted(missing))}: another version of rlhf-t2i wrote it."
        )
    written = facts["versions"].get("rlhf-t2i")
    try:
        own = version("rlhf-t2i")
    except PackageNotFoundError:
        return
    if written is not None and written.split(".")[:2] != own.split(".")[:2]:
        raise ValueError(
            f"{folder} was written by rlhf-t2i {written}, and this is {own}. Publish it with the version that wrote it"
            f"{', of commit ' + facts['git_commit'] if facts.get('git_commit') else ''}."
        )


def _check_config(folder: Path, config: Any, kind: Kind) -> None:
    needed = {"backbone", "training"} if kind == "reward_model" else {
        "model", "num_steps", "evaluation_prompts", "early_stop_reward", "num_denoising_steps", "guidance_scale",
        "evaluation_eta",
    }  # fmt: skip
    if missing := needed - (config.keys() if isinstance(config, dict) else set()):
        raise ValueError(
            f"{folder / 'config.yaml'} lacks {', '.join(sorted(missing))}: another version of rlhf-t2i wrote it."
        )


def _check_files(folder: Path, files: Sequence[str], hint: str) -> None:
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}. {hint}")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
