"""The cache of latents and encoded prompts: equal to encoding on loading, and refused for another model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from reward_model.images import fit, to_tensor
from reward_model.types import PreferencePair
from rlhf_t2i.data.augmentation import UNCHANGED, Augmentation
from rlhf_t2i.data.image_pairs import ImagePairs
from rlhf_t2i.data.latent_cache import TensorCache
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.types import Conditioning
from tests.policies import policy_of


def save_image(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> Path:
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def save_image_once(path: Path, seed: int, size: tuple[int, int]) -> Path:
    return path if path.exists() else save_image(path, seed, size)


def pair_of(prompt: str, winner: Path, loser: Path) -> PreferencePair:
    return PreferencePair(winner, loser, prompt, prompt)


CHANGED = Augmentation("image", 0.5, seed=9)
"""In step 0 it flips the loser of row 0 and leaves row 2 an empty prompt."""


def three_pairs(
    folder: Path, *, policy: DiffusionPolicy, cache_folder: Path | None, augmentation: Augmentation = UNCHANGED
) -> ImagePairs:
    sizes = [(16, 16), (40, 20), (16, 16), (9, 30)]
    a, b, c, d = (save_image_once(folder / f"{i}.png", i, size) for i, size in enumerate(sizes))
    pairs = [pair_of("a fox", a, b), pair_of("a red cat", c, d), pair_of("a fox", b, c)]
    return ImagePairs(
        pairs, policy=policy, read=to_tensor, microbatch_size=3, cache_folder=cache_folder, augmentation=augmentation
    )


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ("tiny_sd", torch.float32),
        ("tiny_sd", torch.bfloat16),
        ("tiny_sdxl", torch.float32),  # with a pooled embedding
        ("tiny_zimage", torch.float32),  # with a mask
    ],
)
def test_cached_pairs_equal_pairs_encoded_on_loading_also_when_flipped_or_without_prompt(
    model: str, dtype: torch.dtype, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    policy = policy_of(request.getfixturevalue(model), dtype)
    plain = three_pairs(tmp_path, policy=policy, cache_folder=None, augmentation=CHANGED).load(
        [2, 0, 1], [0, 2], step=0
    )
    for rank in (1, 0):
        cached = three_pairs(tmp_path, policy=policy, cache_folder=tmp_path / "cache", augmentation=CHANGED)
        cached.fill_cache(rank=rank, num_processes=2)
    found = cached.load([2, 0, 1], [0, 2], step=0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert_close(found.winner, plain.winner, rtol=0, atol=tolerance)
    assert_close(found.loser, plain.loser, rtol=0, atol=tolerance)
    assert_close(found.conditioning.parts, plain.conditioning.parts, rtol=0, atol=tolerance)
    assert (found.winner[0] - found.loser[0]).abs().max() > 0.01
    unchanged = three_pairs(tmp_path, policy=policy, cache_folder=tmp_path / "cache").load([2, 0, 1], [0, 2], step=0)
    assert torch.equal(unchanged.winner, found.winner)
    assert torch.equal(unchanged.loser[1], found.loser[1])
    mirrored = policy.encode_images(fit(to_tensor(tmp_path / "2.png"), *policy.image_size).flip(-1)[None])
    assert_close(found.loser[:1], mirrored, rtol=0, atol=tolerance)
    assert (unchanged.loser[0] - found.loser[0]).abs().max() > 0.01
    empty = Conditioning.cat([policy.encode(["a fox"]), policy.encode([""])])
    assert_close(found.conditioning.parts, empty.to(torch.device("cpu")).parts, rtol=0, atol=tolerance)


def test_an_image_in_pairs_of_several_buckets_is_cached_in_each_of_their_sizes(tiny_sdxl: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_sdxl)
    tall, wide = save_image(tmp_path / "tall.png", 0, (40, 24)), save_image(tmp_path / "wide.png", 1, (24, 40))
    pairs = [pair_of("a fox", tall, wide), pair_of("a fox", tall, tall), pair_of("a cat", wide, wide)]
    plain, cached = (
        ImagePairs(
            pairs, policy=policy, read=to_tensor, microbatch_size=2, cache_folder=folder,
            bucket_sizes=[(16, 16), (12, 20), (20, 12)],
        )
        for folder in (None, tmp_path / "cache")
    )  # fmt: skip
    cached.fill_cache(rank=0, num_processes=1)
    assert plain.groups([2, 0, 1, 0]) == cached.groups([2, 0, 1, 0]) == [[1, 3], [0], [2]]
    for rows, size in (([1, 3], (8, 8)), ([0], (6, 10)), ([2], (10, 6))):
        found, expected = (each.load([2, 0, 1, 0], rows, step=0) for each in (cached, plain))
        assert found.winner.shape == (len(rows), 4, *size)
        assert_close(found.winner, expected.winner, rtol=0, atol=1e-5)
        assert_close(found.loser, expected.loser, rtol=0, atol=1e-5)


def test_a_full_cache_encodes_nothing(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(tiny_sd)
    three_pairs(tmp_path, policy=policy, cache_folder=tmp_path / "cache").fill_cache(rank=0, num_processes=1)
    again = ImagePairs(
        [pair_of("a fox", tmp_path / "0.png", tmp_path / "1.png")],
        policy=policy, read=to_tensor, microbatch_size=3, cache_folder=tmp_path / "cache",
    )  # fmt: skip

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("nothing should be encoded")

    monkeypatch.setattr(DiffusionPolicy, "encode_images", refuse)
    monkeypatch.setattr(DiffusionPolicy, "encode", refuse)
    again.fill_cache(rank=0, num_processes=1)
    assert again.load([0], [0], step=0).winner.shape == (1, 4, 8, 8)


def test_a_changed_image_file_is_encoded_again(tiny_sd: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_sd)
    pairs = three_pairs(tmp_path, policy=policy, cache_folder=tmp_path / "cache")
    pairs.fill_cache(rank=0, num_processes=1)
    before = pairs.load([0], [0], step=0)
    save_image(tmp_path / "0.png", seed=77, size=(20, 20))
    pairs.fill_cache(rank=0, num_processes=1)
    after = pairs.load([0], [0], step=0)
    assert (after.winner - before.winner).abs().max() > 0.01
    assert torch.equal(after.loser, before.loser)


@pytest.mark.parametrize(("part", "folder"), [("autoencoder", "vae"), ("text encoder", "text_encoder")])
def test_a_cache_of_another_model_is_refused(tiny_sd: Path, tmp_path: Path, part: str, folder: str) -> None:
    """One changed weight of 10,000 suffices."""
    from safetensors.torch import load_file, save_file

    three_pairs(tmp_path, policy=policy_of(tiny_sd), cache_folder=tmp_path / "cache").fill_cache(
        rank=0, num_processes=1
    )
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    (file,) = (other / folder).glob("*.safetensors")
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 0.1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"was made with another {part} .*name another one"):
        three_pairs(tmp_path, policy=policy_of(other), cache_folder=tmp_path / "cache")


def test_a_cache_of_another_precision_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_sd)
    three_pairs(tmp_path, policy=policy, cache_folder=tmp_path / "cache").fill_cache(rank=0, num_processes=1)
    with pytest.raises(ValueError, match="another autoencoder"):
        three_pairs(tmp_path, policy=policy_of(tiny_sd, torch.bfloat16), cache_folder=tmp_path / "cache")


def test_a_damaged_cache_file_is_named(tmp_path: Path) -> None:
    TensorCache(tmp_path, part="autoencoder", fingerprint="x").add({"a": torch.ones(3)})
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read .*remove it"):
        TensorCache(tmp_path, part="autoencoder", fingerprint="x")
