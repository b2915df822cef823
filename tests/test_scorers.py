"""Scorers of other projects with tiny random weights: values, preprocessing, gradients and errors."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reward_model.benchmarks.evaluation import record_metrics, score_records
from reward_model.import_published.files import read_tensors
from reward_model.scorers import NAMES, PointwiseScorer, image_reward, load_scorer, pointwise
from reward_model.scorers.hps import fit_into_square
from reward_model.scorers.vqa_score import load_vqa_score
from reward_model.scorers.weights import read_weights
from reward_model.types import PreferencePair
from rlhf_t2i.rewards.load import load_reward
from tests.reward_models import backbone_folder, bytes_of
from tests.scorer_files import aesthetic_tensors, blip_tensors, open_clip_tensors, save_scorers

HERE = [name for name in NAMES if name not in ("hps_v3", "unified_reward")]
"""Scorers that this file tests; the others have files of their own."""
SIZE = 16
PROMPTS = ["a red fox", "two blue cats on a red mat", "a red fox", "cat"]
PIXELS = torch.stack([bytes_of(SIZE, SIZE, seed=seed) for seed in range(4)])
IMAGES = PIXELS.float() / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scorers")
    save_scorers(root)
    return root


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Callable[[str], PointwiseScorer]:
    """Return a loader of scorers by name."""

    def of(name: str) -> PointwiseScorer:
        if name == "vqa_score":
            return PointwiseScorer(name, load_vqa_score(str(backbone_folder("llava")), answer="red"))
        if name == "visual_gpt_score":
            return load_scorer(f"{name}:{backbone_folder('llava')}")
        where = {"clip_score": "clip", "pick_score": "clip"}.get(name, name)
        return load_scorer(f"{name}:{folder / where}")

    return of


def pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


# --- values ----------------------------------------------------------------------------------


def attend(query: Tensor, key: Tensor, value: Tensor, *, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, one image and one head at a time."""
    rows = []
    for q, k, v in zip(query, key, value, strict=True):
        parts = []
        for one, two, three in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            scores = one @ two.T / one.shape[-1] ** 0.5
            parts.append((scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ three)
        rows.append(torch.cat(parts, -1))
    return torch.stack(rows)


class Named:
    """Tensors in float64 under a common prefix of their names."""

    def __init__(self, tensors: dict[str, Tensor], start: str = "") -> None:
        self.tensors, self.start = tensors, start

    def __call__(self, name: str) -> Tensor:
        return self.tensors[self.start + name].double()

    def at(self, start: str) -> Named:
        return Named(self.tensors, self.start + start)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self(f"{name}.weight").T + self(f"{name}.bias")

    def norm(self, name: str, x: Tensor, *, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self(f"{name}.weight"), self(f"{name}.bias"), eps)


def slow_blocks(t: Named, x: Tensor, *, heads: int, mask: Tensor | None = None) -> Tensor:
    """open_clip's residual blocks."""
    for number in range(2):
        block = t.at(f"transformer.resblocks.{number}.")
        inside = block.norm("ln_1", x, eps=1e-5)
        q, k, v = (inside @ block("attn.in_proj_weight").T + block("attn.in_proj_bias")).chunk(3, -1)
        x = x + block.linear("attn.out_proj", attend(q, k, v, heads=heads, mask=mask))
        x = x + block.linear("mlp.c_proj", F.gelu(block.linear("mlp.c_fc", block.norm("ln_2", x, eps=1e-5))))
    return x


def slow_hps(tensors: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """Return the cosine of a CLIP with open_clip's names, which pools the end of the text."""
    t, vision = Named(tensors), Named(tensors, "visual.")
    patches = F.conv2d(pixels.double(), vision("conv1.weight"), stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([vision("class_embedding").expand(len(pixels), 1, -1), patches], 1) + vision("positional_embedding")
    x = slow_blocks(vision, vision.norm("ln_pre", x, eps=1e-5), heads=2)
    images = vision.norm("ln_post", x[:, 0], eps=1e-5) @ vision("proj")
    words = t("token_embedding.weight")[ids] + t("positional_embedding")[: ids.shape[1]]
    words = t.norm(
        "ln_final", slow_blocks(t, words, heads=1, mask=torch.ones(2 * ids.shape[1:]).tril().bool()), eps=1e-5
    )
    texts = words[torch.arange(len(ids)), (ids == 3).int().argmax(1)] @ t("text_projection")
    return F.cosine_similarity(images, texts)


def ids_of(folder: Path, length: int) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(PROMPTS, padding="max_length", max_length=length, return_tensors="pt").input_ids


def clip_pixels(images: Tensor) -> Tensor:
    return (images - torch.tensor(image_reward.MEAN)[:, None, None]) / torch.tensor(image_reward.STD)[:, None, None]


def test_hps_equals_the_cosine_of_open_clips_network(folder: Path, scorer: Callable[[str], PointwiseScorer]) -> None:
    expected = slow_hps(open_clip_tensors(), clip_pixels(IMAGES), ids_of(folder / "hps", 12))
    scores = scorer("hps").score(IMAGES, PROMPTS)
    assert_close(scores.double(), expected, rtol=0, atol=2e-6)
    assert scores.std() > 0.05


def test_hps_may_be_in_transformers_layout_too(folder: Path) -> None:
    """The same weights; an image of the model's size needs no resize, so only the layout differs."""
    scores = load_scorer(f"hps:{folder / 'clip'}").score(IMAGES, PROMPTS)
    logits = load_scorer(f"clip:{folder / 'clip'}").score(IMAGES, PROMPTS)
    scale = CLIPModel.from_pretrained(folder / "clip").logit_scale.exp().item()
    assert_close(scale * scores, logits)


def slow_image_reward(tensors: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """Return the output of BLIP's ViT, a BERT with cross-attention in every layer, and five linear layers."""
    vision, text_encoder = Named(tensors, "blip.visual_encoder."), Named(tensors, "blip.text_encoder.")
    patches = F.conv2d(pixels.double(), vision("patch_embed.proj.weight"), vision("patch_embed.proj.bias"), stride=8)
    x = torch.cat([vision("cls_token").expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1) + vision(
        "pos_embed"
    )
    for block in (vision.at(f"blocks.{number}.") for number in range(2)):
        q, k, v = block.linear("attn.qkv", block.norm("norm1", x, eps=1e-6)).chunk(3, -1)
        x = x + block.linear("attn.proj", attend(q, k, v, heads=1))
        x = x + block.linear("mlp.fc2", F.gelu(block.linear("mlp.fc1", block.norm("norm2", x, eps=1e-6))))
    x = vision.norm("norm", x, eps=1e-6)
    h = (
        text_encoder("embeddings.word_embeddings.weight")[ids]
        + text_encoder("embeddings.position_embeddings.weight")[: ids.shape[1]]
    )
    h = text_encoder.norm("embeddings.LayerNorm", h, eps=1e-12)
    outputs = []
    for row in range(len(ids)):
        real = h[row : row + 1, ids[row] != 0]
        for layer in (text_encoder.at(f"encoder.layer.{number}.") for number in range(2)):
            for name, source in (("attention", None), ("crossattention", x[row : row + 1])):
                part, given = layer.at(f"{name}."), real if source is None else source
                q, k, v = (part.linear(f"self.{w}", real if w == "query" else given) for w in ("query", "key", "value"))
                found = attend(q, k, v, heads=4)
                real = part.norm("output.LayerNorm", part.linear("output.dense", found) + real, eps=1e-12)
            inside = F.gelu(layer.linear("intermediate.dense", real))
            real = layer.norm("output.LayerNorm", layer.linear("output.dense", inside) + real, eps=1e-12)
        outputs.append(real[0, 0])
    answer = torch.stack(outputs)
    for number in (0, 2, 4, 6, 7):
        answer = Named(tensors).linear(f"mlp.layers.{number}", answer)
    return (answer[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_equals_the_published_network(folder: Path, scorer: Callable[[str], PointwiseScorer]) -> None:
    expected = slow_image_reward(blip_tensors(), clip_pixels(IMAGES), ids_of(folder / "image_reward", 35))
    scores = scorer("image_reward").score(IMAGES, PROMPTS)
    assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert scores.std() > 0.05


def test_the_aesthetic_score_is_linear_in_the_normalised_embedding(
    folder: Path, scorer: Callable[[str], PointwiseScorer]
) -> None:
    model = CLIPModel.from_pretrained(folder / "clip")
    embeddings = model.get_image_features(pixel_values=clip_pixels(IMAGES)).pooler_output.double()
    expected, head = embeddings / embeddings.square().sum(1, keepdim=True).sqrt(), Named(aesthetic_tensors())
    for number in (0, 2, 4, 6, 7):
        expected = head.linear(f"layers.{number}", expected)
    scores = scorer("aesthetic").score(IMAGES, PROMPTS)
    assert_close(scores.double(), expected[:, 0], rtol=1e-5, atol=1e-5)
    assert scores.std() > 0.01


def test_clip_score_is_the_clamped_cosine(scorer: Callable[[str], PointwiseScorer]) -> None:
    """exp(2.6592) = 14.2849 is the scale of the logits."""
    cosine = scorer("pick_score").score(IMAGES, PROMPTS) / 14.2849
    assert (cosine < 0).any() and (cosine > 0).any()  # noqa: PT018
    assert_close(scorer("clip_score").score(IMAGES, PROMPTS), 2.5 * cosine.clamp_min(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_vqa_score_equals_the_probability_of_the_answer_in_transformers(family: str) -> None:
    """Question and answer through the family's own template, one image at a time, without padding."""
    source = str(backbone_folder(family))
    score = PointwiseScorer(family, load_vqa_score(source, answer="red"))
    model = AutoModelForImageTextToText.from_pretrained(source).eval()
    tokenizer = score.function.backbone.prompt_tokenizer  # pyright: ignore
    pixels = torch.stack([bytes_of(28, 28, seed=seed) for seed in range(2)]).float() / 255
    expected = []
    for image, prompt in zip(pixels, ["a red fox", "cat"], strict=True):
        question = f'Does this figure show "{prompt}"? Please answer yes or no.'
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = tokenizer.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        assert text.endswith({"llava": "ASSISTANT:", "qwen2_5_vl": "<|im_start|>assistant\n"}[family])
        inputs = score.function.backbone.prepare([image], [question])  # pyright: ignore
        ids = tokenizer.tokenizer(text)["input_ids"]
        at = ids.index(tokenizer.image_token_id)
        num = int((inputs["input_ids"] == tokenizer.image_token_id).sum())
        ids = torch.tensor([[*ids[:at], *[tokenizer.image_token_id] * num, *ids[at + 1 :]]])
        more = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
        if family == "qwen2_5_vl":
            more["mm_token_type_ids"] = (ids == tokenizer.image_token_id).int()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0, -1]
        expected.append(logits.softmax(-1)[tokenizer.tokenizer.convert_tokens_to_ids("red")])
    assert_close(score.score(pixels, ["a red fox", "cat"]), torch.stack(expected), rtol=1e-4, atol=1e-7)


# --- preprocessing -------------------------------------------------------------------------------------


def smooth(height: int, width: int) -> Tensor:
    """Return a smooth image in 8 bits."""
    rough = bytes_of(5, 5).float()[None]
    return F.interpolate(rough, (height, width), mode="bilinear", align_corners=True).round().byte()


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (24, 40), (42, 24)])
def test_pixels_of_image_reward_equal_the_stock_processors(size: tuple[int, int]) -> None:
    """For an even margin; an odd one is rounded differently (see the next test)."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pixels = smooth(*size)
    expected = processor([pil(pixels[0])], return_tensors="pt").pixel_values
    assert_close(image_reward.preprocess(pixels.float() / 255, 16), expected, rtol=0, atol=0.02)


def test_an_odd_margin_is_cropped_as_torchvision_does() -> None:
    """16 x 19 to 16 x 16: a margin of 3, of which round(1.5) = 2 is left."""
    ramp = (torch.arange(19.0) / 19).expand(1, 3, 16, 19)
    assert_close(image_reward.preprocess(ramp, 16), clip_pixels(ramp[..., 2:18]))


@pytest.mark.parametrize(("size", "resized", "corner"), [((32, 16), (16, 8), (0, 4)), ((10, 40), (4, 16), (6, 0))])
def test_pixels_of_hps_are_padded_with_black(
    size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    """Pillow's resize of the image, in the centre of a black square."""
    pixels = smooth(*size)[0]
    small = pil(pixels).resize(resized[::-1], Image.Resampling.BICUBIC)
    square = Image.new("RGB", (16, 16))
    square.paste(small, corner[::-1])
    expected = clip_pixels(torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 255)
    assert_close(fit_into_square(pixels[None].float() / 255, side=16), expected, rtol=0, atol=0.02)


# --- all scorers ------------------------------------------------------------------------


def test_images_are_decoded_and_scored_within_a_number_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch size: files of 64 megapixels would take a gigabyte each."""
    monkeypatch.setattr(pointwise, "MAX_HELD_PIXELS", 150)
    shapes = list[tuple[int, ...]]()

    class Mean:
        model, log_odds_unit = torch.nn.Linear(1, 1), 1.0

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            shapes.append(tuple(images.shape))
            return images.mean((1, 2, 3)) + torch.tensor([float(prompt) for prompt in prompts])

    images = [torch.full((3, 8, width), i / 10) for i, width in enumerate((8, 4, 8, 8, 40, 8, 8))]
    scores = PointwiseScorer("mean", Mean()).score(images, [str(i) for i in range(7)])
    assert_close(scores, torch.arange(7) * 1.1)
    assert shapes == [(1, 3, 8, 8), (1, 3, 8, 4), (2, 3, 8, 8), (1, 3, 8, 40), (2, 3, 8, 8)]


@pytest.mark.parametrize("name", HERE)
def test_a_score_does_not_depend_on_its_batch(name: str, scorer: Callable[[str], PointwiseScorer]) -> None:
    """Alone, in batches of three, in another order, as files and beside an image of another size."""
    one = scorer(name)
    together = one.score(IMAGES, PROMPTS)
    assert together.dtype == torch.float32
    assert not together.requires_grad
    assert_close(one.score(IMAGES, PROMPTS, batch_size=3), together, rtol=1e-4, atol=1e-6)
    assert_close(one.score(IMAGES.flip(0), PROMPTS[::-1]).flip(0), together, rtol=1e-4, atol=1e-6)
    mixed = [pil(PIXELS[0]), smooth(20, 30)[0], *IMAGES[1:]]
    scores = one.score(mixed, [PROMPTS[0], "cat", *PROMPTS[1:]])
    assert_close(scores[[0, 2, 3, 4]], together, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", HERE)
def test_the_gradient_to_the_pixels_equals_finite_differences(
    name: str, scorer: Callable[[str], PointwiseScorer]
) -> None:
    """Through the score function with a resize, in float64."""
    generator = torch.Generator().manual_seed(0)
    images = (0.35 + 0.3 * torch.rand(2, 3, 20, 20, generator=generator).double()).requires_grad_()
    function, prompts = scorer(name).function, PROMPTS[:2]
    function.model.double()
    size, close = (
        (1e-3, 1e-2) if name in ("vqa_score", "visual_gpt_score") else (1e-6, 1e-4)
    )  # the norms of a Llama stay in float32
    try:
        (pixel_gradient,) = torch.autograd.grad(function(images, prompts).sum(), images)
        assert (pixel_gradient.abs().amax((1, 2, 3)) > 0).any()
        for _ in range(2):
            step = torch.randn(images.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                ahead, behind = (function(images + sign * size * step, prompts) for sign in (1, -1))
            expected = (pixel_gradient * step).flatten(1).sum(1)
            assert_close(
                (ahead - behind) / (2 * size), expected, rtol=close, atol=1e-4 * float(pixel_gradient.abs().max())
            )
    finally:
        function.model.float()


def test_a_tokenizer_without_the_answer_as_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'Yes' as .*; it must be one token"):
        load_reward(f"vqa_score:{backbone_folder('llava')}")


@pytest.mark.parametrize("name", ["clip_score", "pick_score", "hps", "image_reward"])
def test_comparisons_are_in_log_odds(name: str, scorer: Callable[[str], PointwiseScorer]) -> None:
    """CLIP's logits for any form of its score; ImageReward's outputs before scaling."""
    one = scorer(name)
    scores = one.score(IMAGES, PROMPTS[:1] * 4)
    unit = {"clip_score": 2.5 / 14.2849, "pick_score": 1, "hps": 1 / 20.0855, "image_reward": 1 / 1.0333395}[name]
    expected = (scores[:2] - scores[2:]) / unit
    assert_close(one.logits(IMAGES[:2], IMAGES[2:], PROMPTS[:1] * 2), expected, rtol=1e-4, atol=1e-5)


def test_a_scorer_is_evaluated_on_pairs_like_a_reward_model(
    scorer: Callable[[str], PointwiseScorer], tmp_path: Path
) -> None:
    files = []
    for i, pixels in enumerate(PIXELS):
        files.append(tmp_path / f"{i}.png")
        pil(pixels).save(files[-1])
    one = scorer("pick_score")
    scores = one.score(IMAGES, PROMPTS[:1] * 4)
    pairs = [PreferencePair(files[i], files[j], PROMPTS[0], PROMPTS[0]) for i, j in ((0, 1), (2, 3), (0, 3))]
    metrics = {metric.name: metric.value for metric in record_metrics(score_records(one, pairs, batch_size=2))}
    right = [bool(scores[i] > scores[j]) for i, j in ((0, 1), (2, 3), (0, 3))]
    assert metrics["accuracy_ties_wrong"] == pytest.approx(sum(right) / 3)


def test_the_recipe_evaluates_a_scorer(folder: Path, scorer: Callable[[str], PointwiseScorer], tmp_path: Path) -> None:
    """On a preference file and on a benchmark, in one run."""
    from recipes.evaluate_reward_model import Config, main

    for i, pixels in enumerate(PIXELS[:2]):
        pil(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "winner": "0.png", "loser": "1.png"}))
    rows = [{"prompt": PROMPTS[0], "path1": "0.png", "path2": "1.png"}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    config = Config(
        reward=f"clip_score:{folder / 'clip'}", test_data=str(tmp_path / "pairs.jsonl"), benchmarks=f"hpdv3:{tmp_path}",
        num_resamples=5, run_folder=str(tmp_path / "run"), num_cpu_threads=1,
    )  # fmt: skip
    found = main(config)
    scores = scorer("clip_score").score(IMAGES[:2], PROMPTS[:1] * 2)
    right = float(scores[0] > scores[1])
    for name in ("pairs", "hpdv3"):
        assert {metric.name: metric.value for metric in found[name]}["accuracy_ties_wrong"] == right
    assert (tmp_path / "run" / "report.html").is_file()


# --- errors ----------------------------------------------------------------------------


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a scorer and changes its tensors."""

    def of(name: str, change: Callable[[dict[str, Tensor]], Any]) -> Path:
        copy = Path(shutil.copytree(folder / name, tmp_path / name))
        (file,) = copy.glob("*.pt")
        tensors = {key: t.contiguous() for key, t in (open_clip_tensors() if name == "hps" else blip_tensors()).items()}
        change(tensors)
        file.unlink()
        save_file(tensors, copy / "weights.safetensors")
        return copy

    return of


@pytest.mark.parametrize(
    ("name", "key", "why"),
    [
        ("hps", "visual.proj", "lacks visual_projection.weight"),
        ("hps", "text_projection", "no tensor 'text_projection', so it is no CLIP in open_clip's layout"),
        (
            "image_reward",
            "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias",
            "lacks text.encoder.layer.1",
        ),
        ("image_reward", "mlp.layers.4.weight", "lacks 'mlp.layers.4.weight' of ImageReward's head"),
        ("image_reward", "blip.visual_encoder.pos_embed", "so it is no ImageReward"),
    ],
)
def test_missing_weights_are_named(name: str, key: str, why: str, broken: Callable[..., Path]) -> None:
    where = broken(name, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=why):
        load_scorer(f"{name}:{where}")


def test_the_layers_of_an_aesthetic_predictor_must_fit_the_clip_beside_them(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder / "aesthetic", tmp_path / "aesthetic"))
    (file,) = copy.glob("*.pth")
    whole = aesthetic_tensors()
    for tensors, why in (
        ({name: t for name, t in whole.items() if name != "layers.4.weight"}, "lacks 'layers.4.weight' of the aes"),
        (whole | {"layers.0.weight": torch.zeros(12, 768)}, "take embeddings of 768 numbers, .* beside it has 16"),
        (whole | {"layers.1.weight": torch.zeros(1)}, "has the unexpected tensor layers.1.weight"),
    ):
        torch.save(tensors, file)
        file = file.rename(copy / f"{len(why)}.pth")  # another file, as a loaded one is kept
        with pytest.raises(ValueError, match=why):
            load_scorer(f"aesthetic:{copy}")
    file.unlink()
    with pytest.raises(ValueError, match=r"needs one \.pth file of linear layers, and the files of openai/clip"):
        load_scorer(f"aesthetic:{copy}")


@pytest.mark.parametrize("name", ["hps", "image_reward"])
def test_unexpected_weights_and_other_shapes_are_refused(name: str, broken: Callable[..., Path]) -> None:
    where = broken(name, lambda tensors: tensors.update({"visual.more": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"weights.safetensors has the unexpected tensor visual.more"):
        load_scorer(f"{name}:{where}")
    key = "visual.ln_post.bias" if name == "hps" else "mlp.layers.7.bias"
    shutil.rmtree(where)
    where = broken(name, lambda tensors: tensors.update({key: torch.zeros(7)}))
    (where / "weights.safetensors").rename(where / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: .* is \(7,\); it must be"):
        load_scorer(f"{name}:{where}")


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt cannot be read"):
        load_scorer(f"hps:{tmp_path}")


def test_weights_that_claim_more_memory_than_their_file_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor of stride 0 claims 8 GB in a file of a kilobyte, and 16 GB in float32; tied weights are read.

    A compressed archive, which torch reads too, is refused before it is unpacked.
    """
    one = torch.zeros(1, dtype=torch.float16)
    torch.save({"weight": one.expand(4 << 30)}, tmp_path / "weights.pt")
    for read in (read_weights, read_tensors):
        with pytest.raises(ValueError, match=r"weights\.pt claim 8,589,934,592 bytes of memory, and the file has"):
            read(tmp_path / "weights.pt")
    torch.save({"weight": torch.zeros(2 << 20)}, tmp_path / "plain.pt")
    compressed = zipfile.ZipFile(tmp_path / "weights.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, compressed:
        for name in plain.namelist():
            compressed.writestr(name, plain.read(name))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
        for read in (read_weights, read_tensors):
            with pytest.raises(ValueError, match=r"weights\.pt claim 8,38\d,\d\d\d bytes of memory, and the file has"):
                read(tmp_path / "weights.pt")
    tied = torch.ones(1 << 20)
    torch.save({"one": tied, "two": tied}, tmp_path / "weights.pt")
    assert read_weights(tmp_path / "weights.pt").keys() == {"one", "two"}


@pytest.mark.parametrize(("name", "title"), [("hps", "HPS"), ("image_reward", "ImageReward")])
def test_a_folder_without_weights_or_tokenizer_is_refused(name: str, title: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no {title} in 'nowhere'"):
        load_scorer(f"{name}:nowhere")
    with pytest.raises(ValueError, match=f"The {title} in .* needs one file of weights .* there are: none"):
        load_scorer(f"{name}:{tmp_path}")
    (file,) = (folder / name).glob("*.pt")
    shutil.copy(file, tmp_path)
    with pytest.raises(ValueError, match=r"(has no tokenizer: put .* beside|has . tokens)"):
        load_scorer(f"{name}:{tmp_path}")


def test_an_unknown_scorer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"no scorer 'pick:x'; write NAME:PATH, .*{', '.join(NAMES)}"):
        load_scorer("pick:x")


def test_invalid_calls_are_refused(scorer: Callable[[str], PointwiseScorer]) -> None:
    one = scorer("hps")
    with pytest.raises(TypeError, match="prompts is one text"):
        one.score(IMAGES[:1], "a")  # pyright: ignore
    with pytest.raises(ValueError, match="4 images came with 1 prompts"):
        one.score(IMAGES, ["a"])
    with pytest.raises(ValueError, match="no image"):
        one.score([], [])
    with pytest.raises(ValueError, match="batch_size is 0"):
        one.score(IMAGES, PROMPTS, batch_size=0)
