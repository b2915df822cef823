"""Questions for annotators: two images of one prompt, in the run folder under names that do not reveal their source.

questions.jsonl   one question per line: its prompt, its two images, and the source of each
images/           8-bit RGB as PNG, named by a hash of the pixels, without metadata
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.image_files import open_image
from reward_model.scorers.pointwise import MAX_HELD_PIXELS
from reward_model.text_files import parse_json
from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.image_grids import save_image_grid
from rlhf_t2i.output.run_folder import IMAGES, QUESTIONS
from rlhf_t2i.prompt_rows import Prompt
from rlhf_t2i.report.comparison import shared_cells, side_by_side
from rlhf_t2i.rewards.load import WeightedSum
from rlhf_t2i.training.metrics import Row

ItemT = TypeVar("ItemT")
Role = Literal["question", "training", "check"]


@dataclass(frozen=True, slots=True)
class Question:
    """Two images of one prompt, of which an annotator chooses the better one."""

    prompt: str
    images: tuple[str, str]
    """File names in images/ without their ending; the only identifiers of images in the browser."""
    sources: tuple[str, str]
    """The source of each image, for the results page; the page with the questions does not show it."""
    criterion: str | None = None
    """What to compare the images by, such as "alignment"; None is the whole."""
    role: Role = "question"
    """training and check: the first image is known to be the better one, and answers are no preferences. An annotator
    is told the known answer after a question of the training round, and not after an attention check."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A question whose images are not saved yet; the two may differ in size."""

    prompt: str
    images: tuple[Float[Tensor, "3 _ _"], Float[Tensor, "3 _ _"]]
    sources: tuple[str, str]


def write_questions(
    folder: Path,
    candidates: Iterable[Candidate],
    *,
    criteria: Sequence[str] = (),
    known: Sequence[tuple[Role, Candidate]] = (),
) -> list[Question]:
    """Write the images, then the list of questions, so that a folder with a list is complete.

    With criteria, each pair becomes one question for each of them. `known` are questions of the training round and
    attention checks.

    Candidates whose two images are identical are dropped. Raises ValueError if none is left.
    """
    questions: list[Question] = []
    num_same = 0
    for candidate in candidates:
        first, second = (save_image(folder, image) for image in candidate.images)
        num_same += first == second
        if first != second:
            images, by = (first, second), criteria or (None,)
            questions += [Question(candidate.prompt, images, candidate.sources, criterion) for criterion in by]
    if not questions:
        raise ValueError(f"There are no questions: {num_same} pairs were found, each of two identical images.")
    for role, candidate in known:
        first, second = (save_image(folder, image) for image in candidate.images)
        questions.append(Question(candidate.prompt, (first, second), candidate.sources, role=role))
    lines = [json.dumps(_row(question), ensure_ascii=False) + "\n" for question in questions]
    write_atomically(folder / QUESTIONS, "".join(lines))
    return questions


def read_questions(folder: Path) -> list[Question] | None:
    """Return the questions in a folder, None if it has none yet; raises ValueError for an invalid line."""
    path = folder / QUESTIONS
    if not path.is_file():
        return None
    questions: list[Question] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            row = parse_json(line)
            (first, second), (one, other) = row["images"], row["sources"]
            prompt = Prompt(row["prompt"], row.get("metadata"))
            if (role := row.get("role", "question")) not in get_args(Role):
                raise ValueError(f"its role is {role!r}")
            questions.append(Question(prompt, (first, second), (one, other), row.get("criterion"), role))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no question: {error}. Restore the file as it was written.") from error
    return questions


def _row(question: Question) -> Row:
    metadata = {"metadata": question.prompt.metadata} if isinstance(question.prompt, Prompt) else {}
    return {**asdict(question), **metadata}


def save_image(folder: Path, image: Float[Tensor, "3 _ _"]) -> str:
    """Write an image to images/ as PNG; return its name, a hash of its pixels."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    name = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()[:20]
    path = image_path(folder, name)
    if not path.is_file():
        part = path.with_name(f"{name}.part.png")
        save_image_grid(part, image[None], num_columns=1)
        part.replace(path)
    return name


def image_path(folder: Path, name: str) -> Path:
    """Return the path of an image of a question."""
    return folder / IMAGES / f"{name}.png"


# --- sources of images ----------------------------------------------------------------------------


def from_runs(folders: Sequence[Path], *, num_pairs: int | None, generator: torch.Generator) -> Iterator[Candidate]:
    """Pair the images of training runs before and after, or of the weights in recipes/evaluate_policy.py.

    Both images of a pair have the same prompt and seed. Raises FileNotFoundError or ValueError, naming the folders, if
    there are no such images.
    """
    entries = side_by_side(folders)
    sheets = {one.grid: read_image(one.grid) for one in entries}
    pairs = [(*two, cell) for two in combinations(entries, 2) for cell in shared_cells(entries)]
    for one, other, cell in subsample(pairs, num_pairs, generator=generator):
        first, second = (_cut_out(sheets[entry.grid], entry.captions, cell) for entry in (one, other))
        yield Candidate(cell[0], (first, second), (one.name, other.name))


def _cut_out(sheet: Float[Tensor, "3 _ _"], captions: Row, cell: tuple[str, int]) -> Float[Tensor, "3 _ _"]:
    cells, columns = list(zip(captions["prompts"], captions["seeds"], strict=True)), captions["columns"]
    side = sheet.shape[2] // columns
    top, left = (side * place for place in divmod(cells.index(cell), columns))
    return sheet[:, top : top + side, left : left + side]


def from_images(
    prompts: Sequence[str],
    first: Float[Tensor, "B 3 Y X"],
    second: Float[Tensor, "B 3 Y X"],
    *,
    sources: tuple[str, str],
) -> Iterator[Candidate]:
    """Pair the images that two policies sampled for the same prompts."""
    for prompt, one, other in zip(prompts, first, second, strict=True):
        yield Candidate(prompt, (one, other), sources)


def subsample(items: Sequence[ItemT], count: int | None, *, generator: torch.Generator) -> list[ItemT]:
    """Draw `count` items without replacement, in their original order; None is all."""
    chosen = torch.randperm(len(items), generator=generator)[:count].sort().values
    return [items[int(i)] for i in chosen]


# --- scores of a reward ---------------------------------------------------------------------------


def score_questions(
    reward: WeightedSum, folder: Path, questions: Sequence[Question], *, device: torch.device, batch_size: int
) -> Float[Tensor, "N 2"]:
    """Return the total reward of both images of each question; images of one size share a batch.

    A batch has at most `batch_size` images, and at most MAX_HELD_PIXELS pixels or one image.
    """
    scores = torch.zeros(len(questions), 2)
    of_size: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, question in enumerate(questions):
        for side, name in enumerate(question.images):
            with open_image(image_path(folder, name)) as image:
                of_size.setdefault(image.size, []).append((number, side))
    for (width, height), places in of_size.items():
        count = min(batch_size, max(1, MAX_HELD_PIXELS // (width * height)))
        for start in range(0, len(places), count):
            rows = places[start : start + count]
            names = [questions[number].images[side] for number, side in rows]
            images = torch.stack([read_image(image_path(folder, name)) for name in names]).to(device)
            with torch.no_grad():
                total, _ = reward(images, [questions[number].prompt for number, _ in rows])
            scores[tuple(torch.tensor(rows).T)] = total.cpu()
    return scores


def read_image(path: Path) -> Float[Tensor, "3 _ _"]:
    """Read a PNG as an image in [0, 1]."""
    with open_image(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
