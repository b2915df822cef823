"""Layout of a run folder: the only module that knows the names of the files in it.

config.yaml         settings
.lock               locked while the run is alive; process id and machine of the process that holds it
.starting           names in the folder before a run that has no results yet
run.json            recipe, command, commit, versions, device and placement
metrics.jsonl       one row for each training step and each evaluation
report.html         the page made from these files
evaluation_prompts.jsonl
                    prompts chosen for evaluation, if the run was given none
images/             image grids, scores and captions of evaluations
checkpoints/        one folder for each checkpoint
lora_kohya/         the LoRA of lora/ in Kohya's key layout (--export_format both)
start/lora/         LoRA that training started from (--init_lora)
lora/, unet/, transformer/, reward_model/
                    trained weights for export, by kind
metrics.json, history.json
                    measurements and training log of a reward model
table.json          results of recipes/evaluate_policy.py
NAME.csv, benchmarks.md, benchmarks.json
                    results of recipes/evaluate_reward_model.py
pairs/              preference pairs that recipes/diffusion_dpo.py sampled
questions.jsonl, answers.jsonl, pairs.jsonl
                    questions, answers and preferences of recipes/collect_preferences.py, with their images in images/
votes/              votes of recipes/live_preferences.py: votes.jsonl, pairs.jsonl or labels.jsonl, images/, and
                    reward_model/, what they taught

A search has one folder per prompt instead of image grids, in the layout of GenEval's scorer:

images/00000/       metadata.jsonl, samples/0000.png, baseline/0000.png and search_0000.json, one of each per search
reward_std.json     standard deviation of the reward that recipes/fk_steering.py measured
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from reward_model.text_files import read_yaml
from rlhf_t2i.output.files import path_from, write_atomically
from rlhf_t2i.output.json_files import read_typed
from rlhf_t2i.shapes.names import TOY_BACKBONE, TOY_MODELS, TOY_PROMPT_SETS, TOY_REWARD_MODELS

CONFIG = "config.yaml"
LOCK = ".lock"
STARTING = ".starting"
RUN_INFO = "run.json"
METRICS = "metrics.jsonl"
REPORT = "report.html"
IMAGES = "images"
EVALUATION_PROMPTS = "evaluation_prompts.jsonl"
CAPTIONS = "captions.json"
EXTREMES = "extremes.json"
CHECKPOINTS = "checkpoints"
START = "start"
KOHYA_LORA = "lora_kohya/lora_kohya.safetensors"
REWARD_MODEL = "reward_model"
REWARD_MODEL_CONFIG = f"{REWARD_MODEL}/llava_reward.json"
REWARD_METRICS = "metrics.json"
REWARD_HISTORY = "history.json"
EVALUATION_TABLE = "table.json"
BENCHMARK_TABLES = "benchmarks.md"
BENCHMARK_RESULTS = "benchmarks.json"
PAIRS = "pairs"
QUESTIONS = "questions.jsonl"
ANSWERS = "answers.jsonl"
COLLECTED_PAIRS = "pairs.jsonl"
VOTES_FOLDER = "votes"
VOTES = "votes.jsonl"
VOTE_LABELS = "labels.jsonl"
REWARD_STD = "reward_std.json"
PROMPT_METADATA = "metadata.jsonl"
SEARCH_SAMPLES = "samples"
SEARCH_BASELINE = "baseline"

_PATHS = ("model", "init_weights", "init_lora", "prompts", "evaluation_prompts", "backbone")
"""Settings that are one path each."""
_NAMES = {*TOY_MODELS, *TOY_PROMPT_SETS, TOY_BACKBONE}


@with_config(ConfigDict(extra="allow", strict=True))
class _RunInfo(TypedDict, total=False):
    """Types of what is read from run.json."""

    recipe: str
    command: str
    working_directory: str
    started: str
    device: str
    git_commit: str | None
    versions: dict[str, str]
    processes: int
    sessions: list[dict[str, Any]]
    microbatch_size: dict[str, int]


@with_config(ConfigDict(extra="allow", strict=True))
class _Captions(TypedDict):
    """Types of captions.json."""

    prompts: list[str]
    seeds: list[int]
    columns: Annotated[int, Gt(0)]


@with_config(ConfigDict(extra="allow", strict=True))
class _Metric(TypedDict):
    """Types of a row of a reward model's metrics.json."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    count: int
    note: str


LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
DENOISER_WEIGHTS = "diffusion_pytorch_model.safetensors"

WeightKind = Literal["lora", "unet", "transformer", "reward_model"]
WEIGHT_FILES: dict[WeightKind, str] = {
    "lora": LORA_WEIGHTS,
    "unet": DENOISER_WEIGHTS,
    "transformer": DENOISER_WEIGHTS,
    "reward_model": "llava_reward.safetensors",
}
"""Weight file of each kind of export, in a folder named after the kind; large ones are sharded, with an index."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings of a run; relative paths of files and folders are those of the working directory.

    Raises ValueError for a file that is damaged or was not written by a run.
    """
    config = read_yaml(folder / CONFIG)
    if not isinstance(config, dict):
        held = "empty" if config is None else reprlib.repr(config)
        raise ValueError(f"{folder / CONFIG} is {held}; a run's has one setting in each line.")
    start = paths_start(folder / CONFIG) if (folder / RUN_INFO).is_file() else None
    if start is None:
        return config
    texts = {name: config[name] for name in _PATHS if isinstance(config.get(name), str)}
    return config | {name: path_from(start, text) or text for name, text in texts.items() if text not in _NAMES}


def paths_start(config: Path) -> Path | None:
    """Return the folder that relative paths in a YAML file of options start from; None is the working directory.

    It is the file's own folder, but for a run's config.yaml the working directory of the command that started the run.
    """
    if config.name != CONFIG or not (config.parent / RUN_INFO).is_file():
        return config.parent
    started_in = Path(read_run_info(config.parent).get("working_directory", "."))
    return None if started_in.resolve() == Path.cwd() else started_in


def holds_run(folder: Path) -> bool:
    """Return True if a folder holds a run with results, alive or not; False for one that ended before its first."""
    return (folder / CONFIG).is_file() and not (folder / STARTING).is_file()


def check_free(folder: Path, *, resumable: bool = True) -> None:
    """Raise FileExistsError if a folder holds a run, which a new one may not replace."""
    if holds_run(folder):
        choices = "Continue it with --resume, or choose" if resumable else "Choose"
        raise FileExistsError(f"{folder} already holds a run. {choices} another --run_folder.")


def run_of(path: Path) -> Path | None:
    """Return the folder of the run that wrote `path`: a run folder, an export in it or a checkpoint; None if none."""
    return next((f for f in (path, path.parent, path.parent.parent) if (f / RUN_INFO).is_file()), None)


def reward_model_of(source: str) -> str:
    """Return the folder of a toy reward model by its name or of the one that a run trained, or else `source` itself."""
    if source in TOY_REWARD_MODELS:
        return str(TOY_REWARD_MODELS[source])
    return str(Path(source) / REWARD_MODEL) if (Path(source) / REWARD_MODEL_CONFIG).is_file() else source


def read_run_info(folder: Path) -> dict[str, Any]:
    """Return the recipe, command, commit and versions of a run; ValueError for a run.json that is not of a run."""
    return read_typed(folder / RUN_INFO, _RunInfo)


def update_run_info(folder: Path, values: Mapping[str, Any]) -> None:
    """Add values to run.json."""
    write_atomically(folder / RUN_INFO, json.dumps({**read_run_info(folder), **values}, indent=1))


def read_captions(folder: Path) -> dict[str, Any]:
    """Return {"prompts", "seeds", "columns"} of the image grids of a run."""
    return read_typed(folder / IMAGES / CAPTIONS, _Captions)


def read_evaluation_table(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the measurements of recipes/evaluate_policy.py, by weights."""
    return read_typed(folder / EVALUATION_TABLE, dict[str, dict[str, float | None]], allow_nan=True)


def read_reward_metrics(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the measurements of a reward model, by data set."""
    return read_typed(folder / REWARD_METRICS, dict[str, list[_Metric]], allow_nan=True)


def read_reward_history(folder: Path) -> list[dict[str, Any]]:
    """Return the training log of a reward model."""
    return read_typed(folder / REWARD_HISTORY, list[dict[str, Any]], allow_nan=True)


def image_grid(folder: Path, step: int) -> Path:
    """Path of the image grid of the evaluation after `step` training steps."""
    return folder / IMAGES / f"step_{step:06d}.png"


def evaluation_scores(folder: Path, step: int) -> Path:
    """Path of the prompts, seeds and scores of the evaluation after `step` training steps."""
    return folder / IMAGES / f"step_{step:06d}.json"


def extremes_grid(folder: Path, step: int) -> Path:
    """Path of the grid of best and worst images of the evaluation after `step` training steps."""
    return folder / IMAGES / f"extremes_{step:06d}.png"


def prompt_folder(folder: Path, prompt: int) -> Path:
    """Path of the images and records of one prompt of a search."""
    return folder / IMAGES / f"{prompt:05d}"


def search_image(prompt_folder: Path, kind: str, search: int) -> Path:
    """Path of an image of a search, `kind` being SEARCH_SAMPLES or SEARCH_BASELINE."""
    return prompt_folder / kind / f"{search:04d}.png"


def search_record(prompt_folder: Path, search: int) -> Path:
    """Path of the record of a search, which is written last."""
    return prompt_folder / f"search_{search:04d}.json"


def search_records(folder: Path) -> list[Path]:
    """Paths of the records of all finished searches of a run, ordered by prompt and search."""
    return sorted((folder / IMAGES).glob("*/search_*.json"))


def is_search(folder: Path) -> bool:
    """True for a run that searches for images instead of training a model."""
    return any((folder / IMAGES).glob(f"*/{PROMPT_METADATA}"))


def is_reward_model(folder: Path) -> bool:
    """True for a run that trains a reward model."""
    return (folder / RUN_INFO).is_file() and read_run_info(folder)["recipe"] == "reward_model"
