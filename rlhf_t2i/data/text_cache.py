"""Encoded prompts in a cache of tensors: their keys and entries."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from reward_model.locations import is_in_bucket, version_in_bucket
from rlhf_t2i.data.latent_cache import TensorCache
from rlhf_t2i.prompt_rows import EditPrompt
from rlhf_t2i.types import Conditioning


def uncached_text(cache: TensorCache, keys: Sequence[str]) -> list[str]:
    """Return the keys of the prompts that are not cached."""
    return [key.removesuffix(".states") for key in cache.missing([f"{key}.states" for key in keys])]


def text_entries(keys: Sequence[str], conditioning: Conditioning) -> Mapping[str, Tensor]:
    """Return the cache entries of encoded prompts, one per part: KEY.states, KEY.pooled, KEY.mask, KEY.image."""
    parts = conditioning.parts.items()
    return {f"{key}.{name}": row for name, rows in parts for key, row in zip(keys, rows, strict=True)}


def cached_text(cache: TensorCache, keys: Sequence[str]) -> Conditioning:
    """Return the conditioning of cached prompts; the entries of one model all have the same parts."""
    names = [name for name in ("states", "pooled", "mask", "image") if not cache.missing([f"{keys[0]}.{name}"])]
    return Conditioning(**{name: cache.get([f"{key}.{name}" for key in keys]) for name in names})


class StoredPrompts:
    """Encoded prompts in a cache; those with a reference image, whose latents depend on its size, are not kept."""

    def __init__(self, cache: TensorCache) -> None:
        self._cache = cache

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts that are not stored."""
        new = {*uncached_text(self._cache, [*map(text_key, prompts)])}
        return [prompt for prompt in prompts if isinstance(prompt, EditPrompt) or text_key(prompt) in new]

    def get(self, prompt: str) -> Conditioning:
        """Return a stored prompt, a batch of one."""
        return cached_text(self._cache, [text_key(prompt)])

    def add(self, encoded: Mapping[str, Conditioning]) -> None:
        """Write prompts, each a batch of one, to one file."""
        plain = {text_key(prompt): row for prompt, row in encoded.items() if not isinstance(prompt, EditPrompt)}
        entries = {name: part for key, row in plain.items() for name, part in text_entries([key], row).items()}
        if entries:
            self._cache.add(entries)


def text_key(prompt: str) -> str:
    """Return a key of a prompt, which changes when its reference image is replaced."""
    return digest(f"{prompt!s}\0{version_of(prompt.image)}" if isinstance(prompt, EditPrompt) else prompt)


def version_of(file: str | Path) -> str:
    """Return a text that changes when a file is replaced, without reading its bytes."""
    if is_in_bucket(file):
        return f"{file}\0{version_in_bucket(str(file))}"
    image = Path(file)
    stat = image.stat()
    return f"{image.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"


def digest(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
