"""Pairs to learn from: two images of one prompt, of which one was preferred, by people or by a judge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_t2i.data.latent_cache import TensorCache
from rlhf_t2i.files import write_atomically
from rlhf_t2i.image_grids import save_image_grid
from rlhf_t2i.types import Conditioning, Policy

_PER_FILE = 512
"""Images in one file of a cache."""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Pairs as an update needs them: clean latents of both images, and what the denoiser is told of the prompt."""

    winner: Float[Tensor, "B C H W"]
    loser: Float[Tensor, "B C H W"]
    conditioning: Conditioning

    def at(self, index: Int[Tensor, " N"]) -> PairBatch:
        """Some of the pairs."""
        return PairBatch(self.winner[index], self.loser[index], self.conditioning[index])


@runtime_checkable
class ImagePair(Protocol):
    """Two image files of one prompt; what the readers of preference files give is one."""

    @property
    def winner_prompt(self) -> str: ...
    @property
    def winner(self) -> Path: ...
    @property
    def loser(self) -> Path: ...


class Share(NamedTuple):
    """What one process does of an optimiser step."""

    rows: range
    """Which of all pairs it learns from."""
    weight: float
    """Of its mean loss, such that the mean over processes is the mean over all pairs; 0 if it only keeps in step."""
    most: int
    """How many rows the process with the most has."""

    def microbatches(self, size: int) -> list[tuple[Tensor, float]]:
        """Which of its rows go through the network at once, and their weight in its gradient; as many in each process.

        A process that has fewer repeats its first row with weight 0: where weights are in parts, all must keep in step.
        """
        parts = torch.arange(len(self.rows)).split(size)
        own = [(part, self.weight * len(part) / len(self.rows)) for part in parts]
        return own + [(torch.arange(1), 0.0)] * (-(-self.most // size) - len(own))


# --- which pairs ----------------------------------------------------------------------------------


def share_of(count: int, *, rank: int, num_processes: int) -> Share:
    """Which of `count` pairs one process learns from, such that all have as many, or one more or less.

    Every process has to take part in the exchange of gradients, so one that is left without a pair takes the first with
    weight 0.
    """
    own = range(count)[rank::num_processes]
    return Share(own or range(1), num_processes * len(own) / count, -(-count // num_processes))


def numbers_of_step(count: int, step: int, *, num_pairs: int, seed: int) -> list[int]:
    """Which of `count` pairs a step learns from: the next of an endless pass, freshly shuffled each time round.

    It is a pure function of the step, so nothing has to be stored to go on after a stop.
    """
    numbers: list[int] = []
    start, stop = step * num_pairs, (step + 1) * num_pairs
    for epoch in range(start // count, -(-stop // count)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        numbers += order[max(0, start - epoch * count) : stop - epoch * count].tolist()
    return numbers


def choose_pairs(
    scores: Float[Tensor, "P K"],
    *,
    choice: Literal["best_worst", "all", "random"],
    generators: Sequence[torch.Generator],
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Winners and losers among the K scored images of each prompt, as indices into the flattened scores.

    The best and the worst, all pairs, or two drawn by the prompt's generator. Two images with equal scores make no
    pair.
    """
    num_prompts, copies = scores.shape
    match choice:
        case "best_worst":
            first, second = scores.argmax(dim=1, keepdim=True), scores.argmin(dim=1, keepdim=True)
        case "all":
            both = torch.combinations(torch.arange(copies), 2).to(scores.device)
            first, second = (side.expand(num_prompts, -1) for side in both.T)
        case "random":
            drawn = [torch.randperm(copies, generator=generator)[:2] for generator in generators]
            first, second = torch.stack(drawn).to(scores.device).split(1, dim=1)
    starts = copies * torch.arange(num_prompts, device=scores.device)[:, None]
    first, second = (first + starts).flatten(), (second + starts).flatten()
    gap = scores.flatten()[first] - scores.flatten()[second]
    winner, loser = torch.where(gap > 0, first, second), torch.where(gap > 0, second, first)
    return winner[gap != 0], loser[gap != 0]


def implicit_preference(margin: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """1 where the policy agrees with a pair, 0 where not, 1/2 where it has no opinion.

    margin = (loser_error - reference_loser_error) - (winner_error - reference_winner_error)
    """
    return (margin.sign() + 1) / 2


# --- pairs in files -------------------------------------------------------------------------------


class ImagePairs:
    """Pairs whose images lie on disk; encoded when they are needed or, with a cache folder, once and for all."""

    def __init__(
        self,
        pairs: Sequence[ImagePair],
        *,
        policy: Policy,
        read: Callable[[Path], Float[Tensor, "3 _ _"]],
        batch_size: int,
        cache_folder: Path | None = None,
    ) -> None:
        """`read` opens an image, in [0, 1]; at most `batch_size` go through the autoencoder at once.

        Raises ValueError for a cache that was made with another autoencoder or text encoder.
        """
        self.pairs, self.policy, self.read, self.batch_size = pairs, policy, read, batch_size
        self.latents_cache = self.text_cache = None
        if cache_folder is not None:
            self.latents_cache = _cache_of(policy, "autoencoder", cache_folder / "latents")
            self.text_cache = _cache_of(policy, "text encoder", cache_folder / "text")

    def __len__(self) -> int:
        return len(self.pairs)

    def fill_cache(self, *, rank: int, num_processes: int) -> None:
        """Encode what the cache lacks, a share in each process; wait for the others before the first `load`."""
        if self.latents_cache is None or self.text_cache is None:
            return
        files = {_key_of(path): path for pair in self.pairs for path in (pair.winner, pair.loser)}
        # What is whose is settled before looking: another process may be adding already.
        keys = self.latents_cache.missing(list(files)[rank::num_processes])
        for start in range(0, len(keys), _PER_FILE):
            some = keys[start : start + _PER_FILE]
            self.latents_cache.add(dict(zip(some, self._encode([files[key] for key in some]), strict=True)))
        prompts = {_digest(pair.winner_prompt): pair.winner_prompt for pair in self.pairs}
        keys = _lacking_text(self.text_cache, list(prompts)[rank::num_processes])
        for start in range(0, len(keys), _PER_FILE):
            some = keys[start : start + _PER_FILE]
            self.text_cache.add(_text_entries(some, self.policy.encode([prompts[key] for key in some])))

    def load(self, numbers: Sequence[int], rows: Sequence[int]) -> PairBatch:
        """Of the pairs with these numbers those in some `rows`, ready to learn from."""
        pairs = [self.pairs[numbers[row]] for row in rows]
        files = [pair.winner for pair in pairs] + [pair.loser for pair in pairs]
        prompts = [pair.winner_prompt for pair in pairs]
        if self.latents_cache is None or self.text_cache is None:
            latents, conditioning = self._encode(files), self.policy.encode(prompts)
        else:
            self.latents_cache.missing([])
            self.text_cache.missing([])
            latents = self.latents_cache.get([_key_of(path) for path in files])
            conditioning = _cached_text(self.text_cache, [_digest(prompt) for prompt in prompts])
        device = next(self.policy.denoiser.parameters()).device
        winner, loser = latents.to(device).chunk(2)
        return PairBatch(winner, loser, conditioning.to(device))

    def _encode(self, files: Sequence[Path]) -> Float[Tensor, "B C H W"]:
        height, width = self.policy.image_size
        parts: list[Tensor] = []
        for start in range(0, len(files), self.batch_size):
            images = [fit(self.read(path), height, width) for path in files[start : start + self.batch_size]]
            parts.append(self.policy.encode_images(torch.stack(images)))
        return torch.cat(parts)


def fit(image: Float[Tensor, "3 _ _"], height: int, width: int) -> Float[Tensor, "3 {height} {width}"]:
    """An image of any size as the model paints them: resized so that it just covers, and the middle cut out.

    Antialiased and bicubic; for a square, the shorter side takes the model's size. The same size is left alone.
    """
    own_height, own_width = image.shape[1:]
    scale = max(height / own_height, width / own_width)
    size = max(height, round(scale * own_height)), max(width, round(scale * own_width))
    if size != (own_height, own_width):
        resized = F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)
        image = resized[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[:, top : top + height, left : left + width]


def _lacking_text(cache: TensorCache, keys: Sequence[str]) -> list[str]:
    """Return the prompts' keys that a cache has no entries of."""
    return [key.removesuffix(".states") for key in cache.missing([f"{key}.states" for key in keys])]


def _text_entries(keys: Sequence[str], conditioning: Conditioning) -> dict[str, Tensor]:
    """Return the cache entries of encoded prompts, one for each part: KEY.states, KEY.pooled, KEY.mask."""
    parts = conditioning.parts.items()
    return {f"{key}.{name}": row for name, rows in parts for key, row in zip(keys, rows, strict=True)}


def _cached_text(cache: TensorCache, keys: Sequence[str]) -> Conditioning:
    """Return the conditioning of cached prompts; one model's entries all have the same parts."""
    names = [name for name in ("states", "pooled", "mask") if not cache.missing([f"{keys[0]}.{name}"])]
    return Conditioning(**{name: cache.get([f"{key}.{name}" for key in keys]) for name in names})


def _cache_of(policy: Policy, part: Literal["autoencoder", "text encoder"], folder: Path) -> TensorCache:
    return TensorCache(folder, part=part, fingerprint=policy.fingerprint(part))


def _key_of(path: Path) -> str:
    """Another file, or the same one written anew, has another key; its bytes need not be read for that."""
    facts = path.stat()
    return _digest(f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- pairs to be kept -----------------------------------------------------------------------------


def save_pairs(
    path: Path,
    images: Float[Tensor, "B 3 Y X"],
    prompts: Sequence[str],
    scores: Float[Tensor, "P K"],
    chosen: tuple[Int[Tensor, " N"], Int[Tensor, " N"]],
    *,
    first: int,
) -> None:
    """Write a preference file as people's are, PATH.jsonl, and into a folder beside it this process's images of it.

    `chosen` are winners and losers as `choose_pairs` found them among all images, of which `first` is the number of
    this process's first. The process that has number 0 writes the list.
    """
    winners, losers = (side.tolist() for side in chosen)
    for number in sorted({*winners, *losers} & {*range(first, first + len(images))}):
        own = images[number - first : number - first + 1]
        save_image_grid(path.parent / path.stem / f"{number:05d}.png", own, num_columns=1)
    if first or not winners:
        return
    flat, lines = scores.flatten().tolist(), list[str]()
    for winner, loser in zip(winners, losers, strict=True):
        row = {
            "prompt": prompts[winner // scores.shape[1]],
            "winner": f"{path.stem}/{winner:05d}.png",
            "loser": f"{path.stem}/{loser:05d}.png",
            "rating_gap": flat[winner] - flat[loser],
            "comment": f"scores {flat[winner]:.6g} and {flat[loser]:.6g}",
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    write_atomically(path, "".join(f"{line}\n" for line in lines))
