"""Preference pairs for Diffusion-DPO: two images of one prompt, of which people or a reward preferred one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward_model.images import fit
from reward_model.types import PreferencePair
from rlhf_t2i.advantages import EQUAL
from rlhf_t2i.data.augmentation import UNCHANGED, Augmentation, ImageView
from rlhf_t2i.data.buckets import Buckets
from rlhf_t2i.data.latent_cache import TensorCache
from rlhf_t2i.prompt_rows import EditPrompt, emptied
from rlhf_t2i.types import Conditioning, Policy

_PER_FILE = 512
"""Images, or prompts, in one file of a cache."""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Pairs as an update takes them: clean latents of both images, and the encoded prompt."""

    winner: Float[Tensor, "B C H W"]
    loser: Float[Tensor, "B C H W"]
    conditioning: Conditioning

    def at(self, index: Int[Tensor, " N"]) -> PairBatch:
        """Return some of the pairs."""
        return PairBatch(self.winner[index], self.loser[index], self.conditioning[index])


@runtime_checkable
class ImagePair(Protocol):
    """Two image files of one prompt, such as a record of a preference file."""

    @property
    def winner_prompt(self) -> str: ...
    @property
    def winner(self) -> Path: ...
    @property
    def loser(self) -> Path: ...


# --- selection of pairs -------------------------------------------------------------------------------


def pairs_of_step(count: int, step: int, *, num_pairs: int, seed: int) -> list[int]:
    """Return the indices of the pairs of a step: the next `num_pairs` of `count`, reshuffled in every epoch.

    A pure function of the step, so that resuming needs no stored state.
    """
    indices: list[int] = []
    start, stop = step * num_pairs, (step + 1) * num_pairs
    for epoch in range(start // count, -(-stop // count)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        indices += order[max(0, start - epoch * count) : stop - epoch * count].tolist()
    return indices


def choose_pairs(
    scores: Float[Tensor, "P K"],
    *,
    selection: Literal["best_worst", "all", "random"],
    generators: Sequence[torch.Generator],
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Return winners and losers among the K scored images of each prompt, as indices into the flattened scores.

    `selection` is the best and the worst image, all pairs, or two images drawn by the prompt's generator. Two images
    with equal scores, as `EQUAL` of `rlhf_t2i.advantages` says, are not a pair.
    """
    num_prompts, copies = scores.shape
    match selection:
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
    one, other = scores.flatten()[first], scores.flatten()[second]
    differ = (one - other).abs() > EQUAL * torch.maximum(one.abs(), other.abs())
    winner, loser = torch.where(one > other, first, second), torch.where(one > other, second, first)
    return winner[differ], loser[differ]


def implicit_preference(margin: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Return 1 where the policy agrees with a pair, 0 where it disagrees, 1/2 where the margin is 0.

    margin = (loser_error - reference_loser_error) - (winner_error - reference_winner_error)
    """
    return (margin.sign() + 1) / 2


def with_instructions(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Return pairs whose prompt holds the image that it says how to edit, if they have one."""
    return [
        pair if pair.reference is None
        else replace(pair, winner_prompt=EditPrompt(pair.winner_prompt, pair.reference, where=pair.where))
        for pair in pairs
    ]  # fmt: skip


# --- pairs in files -----------------------------------------------------------------------------------


class ImagePairs:
    """Pairs of image files, encoded when they are loaded or, with a cache folder, once."""

    def __init__(
        self,
        pairs: Sequence[ImagePair],
        *,
        policy: Policy,
        read: Callable[[Path], Float[Tensor, "3 _ _"]],
        microbatch_size: int,
        cache_folder: Path | None = None,
        augmentation: Augmentation = UNCHANGED,
        bucket_sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        """`read` loads an image with values in [0, 1]; `microbatch_size` images go through the autoencoder at once.

        Images are cropped to the policy's size, or to that of their pair's bucket among `bucket_sizes`. Raises
        ValueError for a cache of another autoencoder or text encoder.
        """
        self.pairs, self.policy, self.read, self.microbatch_size = pairs, policy, read, microbatch_size
        self.augmentation, self.buckets = augmentation, Buckets(bucket_sizes or [policy.image_size])
        self.latents_cache = self.text_cache = None
        if cache_folder is not None:
            self.latents_cache = _cache_of(policy, "autoencoder", cache_folder / "latents")
            self.text_cache = _cache_of(policy, "text encoder", cache_folder / "text")

    def __len__(self) -> int:
        return len(self.pairs)

    def fill_cache(self, *, rank: int, num_processes: int) -> None:
        """Encode this process's share of what is not cached; synchronise processes before the first `load`."""
        if self.latents_cache is None or self.text_cache is None:
            return
        views = (False,) if self.augmentation.random_flip == "none" else (False, True)
        images = {
            self._key_of(view): view
            for pair in self.pairs
            for path in (pair.winner, pair.loser)
            for view in (ImageView(path, flipped, self.size_of(pair)) for flipped in views)
        }
        # Shares are fixed before looking into the cache: another process may be adding to it already.
        keys = self.latents_cache.missing(list(images)[rank::num_processes])
        for size in self.buckets.sizes:
            for some in _chunks([key for key in keys if images[key].size == size]):
                self.latents_cache.add(dict(zip(some, self._encode([images[key] for key in some]), strict=True)))
        empty = bool(self.augmentation.proportion_empty_prompts)
        texts = (
            each for pair in self.pairs for each in (pair.winner_prompt, *map(emptied, [pair.winner_prompt] * empty))
        )
        prompts = {_text_key(prompt): prompt for prompt in texts}
        keys = _uncached_text(self.text_cache, list(prompts)[rank::num_processes])
        for some in _chunks(keys):
            self.text_cache.add(_text_entries(some, self.policy.encode([prompts[key] for key in some])))

    def size_of(self, pair: ImagePair) -> tuple[int, int]:
        """Return height and width, in pixels, that both images of a pair are cropped to."""
        return self.buckets.size_of(pair.winner, pair.loser)

    def groups(self, indices: Sequence[int]) -> list[list[int]]:
        """Return the rows of `indices` whose pairs have one size, for each size."""
        return self.buckets.groups([(self.pairs[i].winner, self.pairs[i].loser) for i in indices])

    def load(self, indices: Sequence[int], rows: Sequence[int], *, step: int) -> PairBatch:
        """Return the pairs `indices[row]` for each of `rows`, as changed in a step, on the policy's device.

        These pairs have one size, as those of a group.
        """
        pairs = [(self.pairs[indices[row]], self.augmentation.changes(step, row)) for row in rows]
        winners = [ImageView(pair.winner, changes.flip_winner, self.size_of(pair)) for pair, changes in pairs]
        images = winners + [ImageView(pair.loser, changes.flip_loser, self.size_of(pair)) for pair, changes in pairs]
        prompts = [emptied(p.winner_prompt) if changes.empty_prompt else p.winner_prompt for p, changes in pairs]
        if self.latents_cache is None or self.text_cache is None:
            latents, conditioning = self._encode(images), self.policy.encode(prompts)
        else:
            self.latents_cache.missing([])  # opens the files that other processes have written
            latents = self.latents_cache.get([self._key_of(image) for image in images])
            conditioning = _cached_text(self.text_cache, [_text_key(prompt) for prompt in prompts])
        device = next(self.policy.denoiser.parameters()).device
        winner, loser = latents.to(device).chunk(2)
        return PairBatch(winner, loser, conditioning.to(device))

    def _encode(self, images: Sequence[ImageView]) -> Float[Tensor, "B C H W"]:
        parts: list[Tensor] = []
        for start in range(0, len(images), self.microbatch_size):
            pixels = [self._read(image) for image in images[start : start + self.microbatch_size]]
            parts.append(self.policy.encode_images(torch.stack(pixels)))
        return torch.cat(parts)

    def _read(self, image: ImageView) -> Float[Tensor, "3 Y X"]:
        pixels = fit(self.read(image.path), *image.size)
        return pixels.flip(-1) if image.flipped else pixels

    def _key_of(self, image: ImageView) -> str:
        """Return a key of an image that changes when its file is replaced, without reading its bytes.

        The size is part of it unless it is the policy's, which is part of the autoencoder's fingerprint.
        """
        key = _digest(_version_of(image.path))
        size = "" if image.size == self.policy.image_size else f".{image.size[0]}x{image.size[1]}"
        return f"{key}{size}.flipped" if image.flipped else f"{key}{size}"


def _cache_of(policy: Policy, part: Literal["autoencoder", "text encoder"], folder: Path) -> TensorCache:
    return TensorCache(folder, part=part, fingerprint=policy.fingerprint(part))


def _chunks(keys: Sequence[str]) -> list[Sequence[str]]:
    return [keys[start : start + _PER_FILE] for start in range(0, len(keys), _PER_FILE)]


def _uncached_text(cache: TensorCache, keys: Sequence[str]) -> list[str]:
    """Return the keys of the prompts that are not cached."""
    return [key.removesuffix(".states") for key in cache.missing([f"{key}.states" for key in keys])]


def _text_entries(keys: Sequence[str], conditioning: Conditioning) -> Mapping[str, Tensor]:
    """Return the cache entries of encoded prompts, one per part: KEY.states, KEY.pooled, KEY.mask, KEY.image."""
    parts = conditioning.parts.items()
    return {f"{key}.{name}": row for name, rows in parts for key, row in zip(keys, rows, strict=True)}


def _cached_text(cache: TensorCache, keys: Sequence[str]) -> Conditioning:
    """Return the conditioning of cached prompts; the entries of one model all have the same parts."""
    names = [name for name in ("states", "pooled", "mask", "image") if not cache.missing([f"{keys[0]}.{name}"])]
    return Conditioning(**{name: cache.get([f"{key}.{name}" for key in keys]) for name in names})


def _text_key(prompt: str) -> str:
    """Return a key of a prompt, which changes when its reference image is replaced."""
    return _digest(f"{prompt!s}\0{_version_of(prompt.image)}" if isinstance(prompt, EditPrompt) else prompt)


def _version_of(image: Path) -> str:
    """Return a text that changes when a file is replaced, without reading its bytes."""
    stat = image.stat()
    return f"{image.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
