"""Pairs: which are made, which are taken, how their images become latents, and what is kept of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from reward_model.datasets import BadRecordError, load_records, load_same_prompt_pairs
from reward_model.images import to_tensor
from reward_model.types import PreferencePair
from rlhf_t2i.data.latent_cache import TensorCache
from rlhf_t2i.data.preferences import (
    ImagePairs,
    choose_pairs,
    fit,
    implicit_preference,
    pairs_of_step,
    save_pairs,
    shard_pairs,
)
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.seeds import generators_for
from rlhf_t2i.settings.lists import whole_numbers

CPU = torch.device("cpu")


# --- which pairs ------------------------------------------------------------------------------------

SCORES = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.5, 0.0, 0.5]])


def pairs_of(choice: str, scores: torch.Tensor = SCORES, seed: int = 0) -> list[tuple[int, int]]:
    generators = generators_for(seed, 1, 0, range(len(scores)))
    winners, losers = choose_pairs(scores, selection=choice, generators=generators)  # type: ignore[arg-type]
    return list(zip(winners.tolist(), losers.tolist(), strict=True))


def test_best_and_worst_by_hand() -> None:
    """The second prompt's images are all alike and make no pair."""
    assert pairs_of("best_worst") == [(1, 0), (6, 7)]


def test_all_pairs_by_hand() -> None:
    assert sorted(pairs_of("all")) == [(1, 0), (1, 2), (2, 0), (6, 7), (8, 7)]


def test_random_pairs_are_of_one_prompt_and_the_better_wins() -> None:
    scores = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    drawn = pairs_of("random", scores)
    assert len(drawn) == 50
    for prompt, (winner, loser) in enumerate(drawn):
        assert winner // 4 == loser // 4 == prompt
        assert scores.flatten()[winner] > scores.flatten()[loser]
    assert len({(winner % 4, loser % 4) for winner, loser in drawn}) > 6, "all kinds of pairs are drawn"
    assert pairs_of("random", scores, seed=1) != drawn


def test_a_tie_is_half_an_agreement() -> None:
    assert implicit_preference(torch.tensor([0.2, -0.1, 0.0, 1e-9])).tolist() == [1.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 12])
def test_shares_cover_all_pairs_once_and_weigh_them_equally(count: int, num_processes: int) -> None:
    values = torch.rand(count, generator=torch.Generator().manual_seed(0))
    shares = [shard_pairs(count, rank=rank, num_processes=num_processes) for rank in range(num_processes)]
    working = [row for share in shares if share.weight for row in share.rows]
    assert sorted(working) == list(range(count))
    mean = sum(share.weight * values[list(share.rows)].mean() for share in shares) / num_processes
    assert_close(mean, values.mean())


def test_an_endless_pass_takes_every_pair_once_in_each_round() -> None:
    taken = [number for step in range(10) for number in pairs_of_step(15, step, num_pairs=6, seed=3)]
    assert [sorted(taken[i : i + 15]) for i in range(0, 60, 15)] == [list(range(15))] * 4
    assert taken[:15] != taken[15:30]
    assert pairs_of_step(15, 0, num_pairs=6, seed=4) != taken[:6]


def test_a_step_may_take_more_pairs_than_there_are() -> None:
    assert sorted(pairs_of_step(2, 1, num_pairs=5, seed=0)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3-5", [3, 4, 5]), ("249, 499", [249, 499]), ("7", [7]), ("5-3", []), ("", []), ("a-b", []), ("1-2-3", []),
     ("-1", []), ("1.5", [])],
)  # fmt: skip
def test_whole_numbers(text: str, expected: list[int]) -> None:
    assert whole_numbers(text) == expected


# --- images ---------------------------------------------------------------------------------------


def test_a_image_of_the_right_size_is_left_alone() -> None:
    image = torch.rand(3, 16, 16)
    assert torch.equal(fit(image, 16, 16), image)


def test_the_shorter_side_takes_the_size_and_the_middle_is_kept() -> None:
    image = torch.zeros(3, 32, 96)
    image[:, :, 32:64] = 1.0
    fitted = fit(image, 16, 16)
    assert fitted.shape == (3, 16, 16)
    assert fitted[:, :, 1:-1].min() > 0.95
    assert fit(image.transpose(1, 2), 16, 16)[:, 1:-1].min() > 0.95


@pytest.mark.parametrize("size", [(5, 9), (17, 16), (16, 1000), (301, 299)])
def test_any_size_fits(size: tuple[int, int]) -> None:
    fitted = fit(torch.rand(3, *size), 16, 24)
    assert fitted.shape == (3, 16, 24)
    assert 0 <= fitted.min() <= fitted.max() <= 1


# --- files ------------------------------------------------------------------------------------------


def save_image(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> Path:
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def save_image_once(path: Path, seed: int, size: tuple[int, int]) -> Path:
    return path if path.exists() else save_image(path, seed, size)


def write(path: Path, *rows: dict[str, object]) -> Path:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        save_image(path.parent / name, seed=ord(name[0]))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


GOOD = {"prompt": "a fox", "winner": "a.png", "loser": "b.png"}
TIE = {"prompt": "a fox", "tie": ["a.png", "b.png"]}
NO_PAIRS = [
    ({"prompt": "a fox", "winner": "a.png", "loser": "a.png"}, "both sides are the image .*a.png with the prompt"),
    (
        {"winner_prompt": "a fox", "loser_prompt": "a cat", "winner": "a.png", "loser": "b.png"},
        "the two sides have different prompts, 'a fox' and 'a cat'; diffusion models are tuned on two images of one prompt",
    ),
    ({"winner_prompt": "a fox", "loser_prompt": "a cat", "image": "a.png"}, "the two sides have different prompts"),
    ({"prompt": "a fox", "image": "a.png", "label": 1}, "this is a label of one image"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), NO_PAIRS)
def test_what_is_no_pair_is_refused_with_its_line(tmp_path: Path, row: dict[str, object], message: str) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD, row)
    with pytest.raises(BadRecordError, match=rf"pairs\.jsonl:2: {message}"):
        load_same_prompt_pairs([path], image_root=None, skipped=None)


def test_what_is_no_pair_is_skipped_and_written_down(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", *[row for row, _ in NO_PAIRS], GOOD)
    (pair,) = load_same_prompt_pairs([path], image_root=None, skipped=tmp_path / "run" / "skipped.jsonl")
    assert pair.where.endswith(":5")
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["where"].rpartition(":")[2] for row in skipped) == ["1", "2", "3", "4"]
    assert all(row["reason"] for row in skipped)


def test_two_names_of_one_file_are_one_image(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", {**GOOD, "winner": "link.png", "loser": "a.png"})
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(BadRecordError, match="both sides are the image"):
        load_same_prompt_pairs([path], image_root=None, skipped=None)


def test_ties_are_left_out_and_a_file_of_nothing_else_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", TIE, GOOD)
    assert [pair.where for pair in load_same_prompt_pairs([path], image_root=None, skipped=None)] == [f"{path}:2"]
    path = write(tmp_path / "pairs.jsonl", TIE, TIE)
    with pytest.raises(ValueError, match=r"There is no pair of two images of one prompt .* in .*pairs\.jsonl"):
        load_same_prompt_pairs([path], image_root=None, skipped=None)


def test_saved_pairs_are_a_preference_file_like_any_other(tmp_path: Path) -> None:
    """Two processes write their own images, the first the list; the ordinary reader takes all of it."""
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([[0.25, 1.0, 0.5], [2.0, -1.0, 0.0]])
    chosen = choose_pairs(scores, selection="best_worst", generators=generators_for(0, 1, 0, range(2)))
    path = tmp_path / "pairs" / "step_000001.jsonl"
    for first in (3, 0):
        save_pairs(path, images[first : first + 3], ["a fox", "a cat"], scores, chosen, first=first)

    one, two = load_records(path)
    assert (one.winner_prompt, two.winner_prompt) == ("a fox", "a cat")  # type: ignore[union-attr]
    assert (one.rating_gap, two.rating_gap) == (0.75, 3.0)  # type: ignore[union-attr]
    for record, (winner, loser) in ((one, (1, 0)), (two, (3, 4))):
        assert_close(to_tensor(record.winner), images[winner], rtol=0, atol=0.5 / 255 + 1e-6)  # type: ignore[union-attr]
        assert_close(to_tensor(record.loser), images[loser], rtol=0, atol=0.5 / 255 + 1e-6)  # type: ignore[union-attr]
    assert len(list(path.with_suffix("").iterdir())) == 4, "only images of pairs are kept"
    assert len(load_same_prompt_pairs([path.parent], image_root=None, skipped=None)) == 2


# --- the cache --------------------------------------------------------------------------------------


def policy_of(folder: Path, dtype: torch.dtype = torch.float32) -> DiffusionPolicy:
    return load_policy(str(folder), device=CPU, dtype=dtype)


def pair_of(prompt: str, winner: Path, loser: Path) -> PreferencePair:
    return PreferencePair(winner, loser, prompt, prompt)


def three_pairs(folder: Path, *, policy: DiffusionPolicy, cache_folder: Path | None) -> ImagePairs:
    sizes = [(16, 16), (40, 20), (16, 16), (9, 30)]
    a, b, c, d = (save_image_once(folder / f"{i}.png", i, size) for i, size in enumerate(sizes))
    pairs = [pair_of("a fox", a, b), pair_of("a red cat", c, d), pair_of("a fox", b, c)]
    return ImagePairs(pairs, policy=policy, read=to_tensor, microbatch_size=3, cache_folder=cache_folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_pairs_are_those_that_are_not(tiny_sd: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    policy = policy_of(tiny_sd, dtype)
    plain = three_pairs(tmp_path, policy=policy, cache_folder=None).load([2, 0, 1], [0, 2])
    for rank in (1, 0):
        cached = three_pairs(tmp_path, policy=policy, cache_folder=tmp_path / "cache")
        cached.fill_cache(rank=rank, num_processes=2)
    found = cached.load([2, 0, 1], [0, 2])
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert_close(found.winner, plain.winner, rtol=0, atol=tolerance)
    assert_close(found.loser, plain.loser, rtol=0, atol=tolerance)
    assert_close(found.conditioning.parts, plain.conditioning.parts, rtol=0, atol=tolerance)
    assert (found.winner[0] - found.loser[0]).abs().max() > 0.01


def test_a_full_cache_encodes_nothing_again(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(tiny_sd)
    three_pairs(tmp_path, policy=policy, cache_folder=tmp_path / "cache").fill_cache(rank=0, num_processes=1)
    again = ImagePairs(
        [pair_of("a fox", tmp_path / "0.png", tmp_path / "1.png")],
        policy=policy, read=to_tensor, microbatch_size=3, cache_folder=tmp_path / "cache",
    )  # fmt: skip

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("nothing is to be encoded")

    monkeypatch.setattr(DiffusionPolicy, "encode_images", refuse)
    monkeypatch.setattr(DiffusionPolicy, "encode", refuse)
    again.fill_cache(rank=0, num_processes=1)
    assert again.load([0], [0]).winner.shape == (1, 4, 8, 8)


def test_a_image_that_changed_is_encoded_anew(tiny_sd: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_sd)
    pairs = three_pairs(tmp_path, policy=policy, cache_folder=tmp_path / "cache")
    pairs.fill_cache(rank=0, num_processes=1)
    before = pairs.load([0], [0])
    save_image(tmp_path / "0.png", seed=77, size=(20, 20))
    pairs.fill_cache(rank=0, num_processes=1)
    after = pairs.load([0], [0])
    assert (after.winner - before.winner).abs().max() > 0.01
    assert torch.equal(after.loser, before.loser)


@pytest.mark.parametrize(("part", "folder"), [("autoencoder", "vae"), ("text encoder", "text_encoder")])
def test_a_cache_of_another_model_is_refused(tiny_sd: Path, tmp_path: Path, part: str, folder: str) -> None:
    """One weight of 10,000 suffices."""
    from safetensors.torch import load_file, save_file

    three_pairs(tmp_path, policy=policy_of(tiny_sd), cache_folder=tmp_path / "cache").fill_cache(
        rank=0, num_processes=1
    )
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    (file,) = (other / folder).glob("*.safetensors")
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 0.1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"was made with another {part} .*name another cache_folder"):
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


# --- latents and noise ------------------------------------------------------------------------------


def images_of(size: Sequence[int]) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


def test_latents_are_those_of_diffusers_and_a_draw_has_their_spread(tiny_sd: Path) -> None:
    from diffusers import AutoencoderKL

    policy, images = policy_of(tiny_sd), images_of((16, 16))
    vae = AutoencoderKL.from_pretrained(tiny_sd / "vae")
    with torch.no_grad():
        latent_dist = vae.encode(images * 2 - 1).latent_dist
    scale = vae.config.scaling_factor
    assert_close(policy.encode_images(images), latent_dist.mean * scale)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    drawn = policy.encode_images(images, generators=[torch.Generator().manual_seed(5) for _ in range(2)])
    assert_close(drawn, (latent_dist.mean + latent_dist.std * noise) * scale)


def test_encoding_undoes_decoding_in_the_built_in_world() -> None:
    """A drawn image survives the way through latents, and its latents survive the way through the image."""
    from rlhf_t2i.shapes.scenes import all_scenes, render

    policy = load_policy("shapes", device=CPU)
    images = render(all_scenes("one", "training")[:8], rng=np.random.default_rng(0))
    assert policy.image_size == images.shape[-2:]
    latents = policy.encode_images(images)
    with torch.no_grad():
        again = policy.decode(latents)
    assert (again - images).abs().mean() < 0.02
    assert (policy.encode_images(again) - latents).square().mean() < 0.05 * latents.var()


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v"])
def test_noise_and_target_are_those_of_diffusers(model: str, request: pytest.FixtureRequest) -> None:
    """add_noise, and for a v model get_velocity, at all of its levels."""
    from diffusers import DDIMScheduler

    from rlhf_t2i.diffusion.forward import noise_to
    from rlhf_t2i.types import Prediction

    folder = request.getfixturevalue(model)
    policy, times = policy_of(folder), torch.arange(1000)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    clean, noise = torch.randn(2, 1000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    level = policy.levels_at(times)
    assert_close(noise_to(clean, level, noise), scheduler.add_noise(clean, noise, times))
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(clean, noise, times) if is_v else noise
    assert_close(policy.to_output(Prediction(clean, noise), level), target)
    assert torch.equal(level.model_time, times.float())


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v"])
def test_the_error_is_that_of_the_unets_own_output(model: str, request: pytest.FixtureRequest) -> None:
    """As diffusers' training scripts compute it."""
    from diffusers import DDIMScheduler

    from rlhf_t2i.sampling.denoising_errors import denoising_errors

    folder = request.getfixturevalue(model)
    policy, times = policy_of(folder), torch.tensor([999, 500, 1])
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = policy.encode(["a fox", "a cat", "a dog"])
    with torch.no_grad():
        found = denoising_errors(policy, clean, noise, policy.levels_at(times), text)
        output = policy.network(scheduler.add_noise(clean, noise, times), times, text.states).sample
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(clean, noise, times) if is_v else noise
    assert_close(found, (output - target).square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("times", [[0, 1000], [-1, 5]])
def test_times_that_the_model_does_not_know_are_refused(tiny_sd: Path, times: list[int]) -> None:
    with pytest.raises(
        ValueError, match=rf"times range from {times[0]} to {times[1]}; the model was trained at 0 to 999"
    ):
        policy_of(tiny_sd).levels_at(torch.tensor(times))
