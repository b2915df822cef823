"""Images of preference pairs for Diffusion-DPO: decoded and encoded when a step needs them, or once into a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward_model.datasets.order import block_order, mixed_order
from reward_model.datasets.refill import Refill, unusable
from reward_model.datasets.table import RecordTable
from reward_model.images import fit
from reward_model.locations import is_of_hub
from reward_model.stored_images import ImageSource, StoredImage
from rlhf_t2i.data.augmentation import UNCHANGED, Augmentation, ImageView
from rlhf_t2i.data.buckets import Buckets
from rlhf_t2i.data.latent_cache import TensorCache
from rlhf_t2i.data.preferences import pairs_of_step, random_order
from rlhf_t2i.data.text_cache import cached_text, digest, text_entries, text_key, uncached_text, version_of
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
    """Two images of one prompt, such as a record of a preference file."""

    @property
    def winner_prompt(self) -> str: ...
    @property
    def winner(self) -> ImageSource: ...
    @property
    def loser(self) -> ImageSource: ...
    @property
    def where(self) -> str: ...
    @property
    def reference(self) -> Path | None: ...


def instructions_of(pairs: Sequence[ImagePair]) -> list[str]:
    """Return the prompts of all pairs if one of them is of edits of an image; an empty list without, at once."""
    if isinstance(pairs, RecordTable) and all(p.column(0).null_count == len(p) for p in pairs.batches("reference")):
        return []
    return [_prompt_of(pair) for pair in pairs] if any(pair.reference is not None for pair in pairs) else []


def _prompt_of(pair: ImagePair) -> str:
    """Return the prompt of a pair, which holds the image that it says how to edit, if there is one."""
    if pair.reference is None:
        return pair.winner_prompt
    return EditPrompt(pair.winner_prompt, pair.reference, where=pair.where)


class ImagePairs:
    """Pairs of images, decoded and encoded when they are loaded or, with a cache folder, once."""

    def __init__(  # noqa: PLR0913  # one keyword for each part of the reading
        self,
        pairs: Sequence[ImagePair],
        *,
        policy: Policy,
        read: Callable[[ImageSource], Float[Tensor, "3 _ _"]],
        microbatch_size: int,
        cache_folder: Path | None = None,
        augmentation: Augmentation = UNCHANGED,
        bucket_sizes: Sequence[tuple[int, int]] = (),
        skipped: Path | None = None,
        num_workers: int = 0,
        weights: Sequence[float] = (),
    ) -> None:
        """`read` loads an image with values in [0, 1], in `num_workers` threads.

        `microbatch_size` images go through the autoencoder at once. They are cropped to the policy's size, or to that
        of their pair's bucket among `bucket_sizes`. A pair with an image that cannot be read is written to the file
        `skipped` and replaced by the next one; without, it raises BadRecordError. `weights` are those of the sources of
        the pairs, as `mixed_order` takes them. Raises ValueError for a cache of another autoencoder or text encoder.
        """
        self.pairs, self.policy, self.read, self.microbatch_size = pairs, policy, read, microbatch_size
        self.augmentation, self.buckets = augmentation, Buckets(bucket_sizes or [policy.image_size])
        self.refill = Refill(len(pairs), skipped=skipped)
        self.weights, self._order = weights, lru_cache(maxsize=2)(self._order_of_epoch)
        self.readers = ThreadPoolExecutor(num_workers) if num_workers else None
        self.latents_cache = self.text_cache = None
        if cache_folder is not None:
            self.latents_cache = _cache_of(policy, "autoencoder", cache_folder / "latents")
            self.text_cache = _cache_of(policy, "text encoder", cache_folder / "text")

    def __len__(self) -> int:
        return len(self.pairs)

    def of_step(self, step: int, *, num_pairs: int, seed: int) -> list[int]:
        """Return the indices of the pairs of a step, as `pairs_of_step`; rows of one Parquet row group are near."""
        return pairs_of_step(len(self.pairs), step, num_pairs=num_pairs, seed=seed, order=self._order)

    def _order_of_epoch(self, count: int, epoch: int, seed: int) -> Int[Tensor, " N"]:
        if not isinstance(self.pairs, RecordTable):
            return random_order(count, epoch, seed)
        blocks = self.pairs.column("block")
        if self.weights:
            return torch.from_numpy(mixed_order(blocks, self.pairs.sources(), self.weights, seed=seed, epoch=epoch))
        if (blocks < 0).all():
            return random_order(count, epoch, seed)
        return torch.from_numpy(block_order(blocks, seed=seed, epoch=epoch))

    def fill_cache(self, *, rank: int, num_processes: int) -> None:
        """Encode this process's share of what is not cached; synchronise processes before the first `load`.

        Processes take turns at parts of the pairs. An image that cannot be read is left out here, and met by `load`.
        """
        if self.latents_cache is None or self.text_cache is None:
            return
        views = (False,) if self.augmentation.random_flip == "none" else (False, True)
        for start in range(rank * _PER_FILE // 2, len(self.pairs), num_processes * _PER_FILE // 2):
            pairs = [self.pairs[i] for i in range(start, min(start + _PER_FILE // 2, len(self.pairs)))]
            images = dict[str, ImageView]()
            for pair in pairs:
                with suppress(OSError, ValueError):
                    sides = [ImageView(s, f, self.size_of(pair)) for s in (pair.winner, pair.loser) for f in views]
                    images |= {self._key_of(view): view for view in sides}
            for size in self.buckets.sizes:
                keys = [key for key in self.latents_cache.missing(list(images)) if images[key].size == size]
                found = self._encode_readable({key: images[key] for key in keys})
                for some in _chunks(list(found)):
                    self.latents_cache.add({key: found[key] for key in some})
            texts = {*map(_prompt_of, pairs)}
            texts |= {*map(emptied, texts)} if self.augmentation.proportion_empty_prompts else set()
            prompts = {text_key(text): text for text in sorted(texts)}
            if keys := uncached_text(self.text_cache, list(prompts)):
                self.text_cache.add(text_entries(keys, self.policy.encode([prompts[key] for key in keys])))

    def size_of(self, pair: ImagePair) -> tuple[int, int]:
        """Return height and width, in pixels, that both images of a pair are cropped to."""
        return self.buckets.size_of(pair.winner, pair.loser)

    def groups(self, indices: Sequence[int]) -> list[list[int]]:
        """Return the rows of `indices` whose pairs have one size, for each size."""

        def sides(usable: list[int]) -> list[list[int]]:
            pairs = [self.pairs[i] for i in usable]
            for position, pair in enumerate(pairs):
                with unusable(position):
                    self.size_of(pair)
            return self.buckets.groups([(pair.winner, pair.loser) for pair in pairs])

        return self.refill.collate(list(indices), sides, where=self._where)

    def load(self, indices: Sequence[int], rows: Sequence[int], *, step: int) -> PairBatch:
        """Return the pairs `indices[row]` for each of `rows`, as changed in a step, on the policy's device.

        These pairs have one size, as those of a group.
        """
        wanted, size = [indices[row] for row in rows], None if len(self.buckets.sizes) > 1 else self.buckets.sizes[0]

        def load(usable: list[int]) -> PairBatch:
            nonlocal size
            size = size or self.size_of(self.pairs[usable[0]])
            return self._load(usable, rows, step=step, size=size)

        return self.refill.collate(wanted, load, where=self._where)

    def _where(self, index: int) -> str:
        return self.pairs[index].where

    def _load(self, indices: list[int], rows: Sequence[int], *, step: int, size: tuple[int, int]) -> PairBatch:
        pairs = [(self.pairs[i], self.augmentation.changes(step, row)) for i, row in zip(indices, rows, strict=True)]
        images = [ImageView(pair.winner, changes.flip_winner, size) for pair, changes in pairs]
        images += [ImageView(pair.loser, changes.flip_loser, size) for pair, changes in pairs]
        texts = [(_prompt_of(pair), changes.empty_prompt) for pair, changes in pairs]
        prompts = [emptied(text) if empty else text for text, empty in texts]
        if self.latents_cache is None or self.text_cache is None:
            latents, conditioning = self._encode(images), self.policy.encode(prompts)
        else:
            keys = list[str]()
            for position, image in enumerate(images):
                with unusable(position % len(pairs)):
                    keys.append(self._key_of(image))
            if missing := {*self.latents_cache.missing(keys)}:  # opens the files that other processes have written
                # One that could not be read when the cache was filled, or a pair that replaces another.
                new = {key: (position, view) for position, (key, view) in enumerate(zip(keys, images, strict=True))}
                for key in missing:
                    position, view = new[key]
                    self.latents_cache.add({key: self._encode([view], positions=[position % len(pairs)])[0]})
            latents = self.latents_cache.get(keys)
            conditioning = cached_text(self.text_cache, [text_key(prompt) for prompt in prompts])
        device = next(self.policy.denoiser.parameters()).device
        winner, loser = latents.to(device).chunk(2)
        return PairBatch(winner, loser, conditioning.to(device))

    def _encode(self, images: Sequence[ImageView], *, positions: Sequence[int] = ()) -> Float[Tensor, "B C H W"]:
        """Return the latents of images; `positions` are those of their pairs, by default winners before losers."""
        positions = positions or [i % (len(images) // 2) for i in range(len(images))]
        parts: list[Tensor] = []
        for start in range(0, len(images), self.microbatch_size):
            rows = slice(start, start + self.microbatch_size)
            pixels = list(self._map(self._read_of_pair, images[rows], positions[rows]))
            parts.append(self.policy.encode_images(torch.stack(pixels)))
        return torch.cat(parts)

    def _encode_readable(self, images: Mapping[str, ImageView]) -> dict[str, Tensor]:
        """Return the latents of those images that can be read."""
        found = dict[str, Tensor]()
        for start in range(0, len(images), self.microbatch_size):
            keys = list(images)[start : start + self.microbatch_size]
            read = zip(keys, self._map(self._read_or_none, [images[key] for key in keys]), strict=True)
            pixels = {key: image for key, image in read if image is not None}
            if pixels:
                found |= dict(zip(pixels, self.policy.encode_images(torch.stack([*pixels.values()])), strict=True))
        return found

    def _map(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> Iterator[Any]:
        return (self.readers.map if self.readers else map)(function, *arguments)

    def _read(self, image: ImageView) -> Float[Tensor, "3 Y X"]:
        pixels = fit(self.read(image.source), *image.size)
        return pixels.flip(-1) if image.flipped else pixels

    def _read_of_pair(self, image: ImageView, position: int) -> Float[Tensor, "3 Y X"]:
        with unusable(position):
            return self._read(image)

    def _read_or_none(self, image: ImageView) -> Float[Tensor, "3 Y X"] | None:
        try:
            return self._read(image)
        except (OSError, ValueError):
            return None

    def _key_of(self, image: ImageView) -> str:
        """Return a key of an image that changes when its file is replaced, without reading its bytes.

        The size is part of it unless it is the policy's, which is part of the autoencoder's fingerprint.
        """
        source, place = image.source, ""
        if isinstance(source, StoredImage):
            place = f"\0{source.start}\0{source.size}\0{source.column}"
            source = source.file
        key = digest(f"{source if is_of_hub(source) else version_of(source)}{place}")
        size = "" if image.size == self.policy.image_size else f".{image.size[0]}x{image.size[1]}"
        return f"{key}{size}.flipped" if image.flipped else f"{key}{size}"


def _cache_of(policy: Policy, part: Literal["autoencoder", "text encoder"], folder: Path) -> TensorCache:
    return TensorCache(folder, part=part, fingerprint=policy.fingerprint(part))


def _chunks(keys: Sequence[str]) -> list[Sequence[str]]:
    return [keys[start : start + _PER_FILE] for start in range(0, len(keys), _PER_FILE)]
