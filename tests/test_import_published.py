"""Import of published LLaVA-Reward checkpoints at tiny size, compared with a slow reference of the published code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.testing import assert_close

from reward_model.backbones.patches import PatchPreprocessor
from reward_model.backbones.qwen2_5_vl import PUBLISHED_FIRST_BOUNDS
from reward_model.checkpoint import read_config
from reward_model.import_published.__main__ import main
from reward_model.import_published.importer import import_published
from reward_model.import_published.names import VARIANTS
from reward_model.scoring import LlavaReward
from tests.reward_models import ALL_FAMILIES, WIDTH, backbone_folder, fresh_backbone, random_image

FAMILIES = [family for family in ALL_FAMILIES if family in VARIANTS]
PROMPTS = ["a red fox", "", "a blue cat on a red fox"]
SIZES = [(56, 56), (112, 50), (61, 131)]
TAU, RANK, ALPHA = 0.1, 2, 6.0
SMALL = {"qwen2_5_vl": {"min_pixels": 3136, "max_pixels": 12544}, "phi3_v": {"num_crops": 4}}


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published image sizes have more tokens than the tiny models have positions."""
    for family, bounds in SMALL.items():
        for name, value in bounds.items():
            monkeypatch.setitem(VARIANTS[family].bounds, name, value)


def drawn(*shape: int, seed: int, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def published(family: str, *, skip_ca: bool = True, general_preference: bool = False) -> dict[str, dict[str, Tensor]]:
    """Return the two weight files of a checkpoint, with weights large enough for each to matter."""
    backbone, variant, lora = fresh_backbone(family), VARIANTS[family], {}
    for i, (name, layer) in enumerate(backbone.language_model.named_modules()):
        if isinstance(layer, nn.Linear):
            for half, shape in (("A", (RANK, layer.in_features)), ("B", (layer.out_features, RANK))):
                lora[f"{variant.decoder}{name}.lora_{half}.weight"] = drawn(*shape, seed=2 * i + (half == "B"))
    rest = {"value_head.weight": drawn(1 + general_preference, WIDTH, seed=1000)}
    if skip_ca:
        # Attention uniform enough for additional keys to take a share of it, and distinct values.
        scales = {"q": 0.1, "k": 0.1, "v": 1.0}
        rest |= {f"W_{w}.weight": drawn(WIDTH, WIDTH, seed=ord(w), scale=scale) for w, scale in scales.items()}
        rest["ca_layernorm.weight"] = 1 + drawn(WIDTH, seed=1004)
    for i, (name, tensor) in enumerate(backbone.projector.named_parameters()):
        rest[variant.projector + name] = tensor.detach() + drawn(*tensor.shape, seed=1005 + i, scale=0.1)
    return {"lora/adapter_model.bin": lora, "pytorch_model.bin": rest}


def write(folder: Path, files: dict[str, dict[str, Tensor]], **settings: Any) -> Path:
    """Write the folder as the published trainer does."""
    (folder / "lora").mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        torch.save(tensors, folder / name)
    adapter = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "bias": "none"}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(adapter))
    known = {"general_preference_tau": TAU, "value_head_dim": 2, "add_cross_attention": True}
    (folder / "reward_config.yaml").write_text(yaml.safe_dump({**known, "is_general_preference": False, **settings}))
    return folder


def slow_outputs(family: str, files: dict[str, dict[str, Tensor]], images: list[Tensor], *, skip_ca: str) -> Tensor:
    """Return the outputs of the published code for a left-padded batch, in float64, with SkipCA keys `skip_ca`."""
    variant, bounds = VARIANTS[family], SMALL.get(family, {})
    backbone = fresh_backbone(family, template="published", padding_side="left", **bounds)
    lora, rest = (
        {k: v.double() for k, v in files[name].items()} for name in ("lora/adapter_model.bin", "pytorch_model.bin")
    )
    backbone.model.double()
    for name, layer in backbone.language_model.named_modules():
        if isinstance(layer, nn.Linear):
            down, up = (lora[f"{variant.decoder}{name}.lora_{half}.weight"] for half in "AB")
            layer.weight.copy_(layer.weight + ALPHA / RANK * up @ down)
    for name, tensor in backbone.projector.named_parameters():
        tensor.copy_(rest[variant.projector + name])
    inputs = backbone.prepare(images, PROMPTS)
    output = backbone.forward(inputs)
    states = output.hidden
    if skip_ca != "none":
        attended = torch.stack(
            [attention(rest, states[i], keys_of(skip_ca, backbone, inputs, output, i)) for i in range(len(states))]
        )
        added = states + attended
        scale = added.square().mean(dim=-1, keepdim=True) + variant.skip_ca_eps
        states = rest["ca_layernorm.weight"] * added / scale.sqrt()
    return (states @ rest["value_head.weight"].T)[:, -1]


def keys_of(skip_ca: str, backbone: Any, inputs: Any, output: Any, row: int) -> Tensor:
    if skip_ca == "visual":
        return output.visual[row][output.visual_mask[row]]
    if skip_ca == "visual_and_padding":
        return output.visual[row]
    embedded = backbone.model.get_input_embeddings().weight[inputs["input_ids"][row]]
    return embedded[inputs["input_ids"][row] == backbone.prompt_tokenizer.tokenizer.pad_token_id]


def attention(rest: dict[str, Tensor], states: Tensor, keys: Tensor) -> Tensor:
    """Return attention of all positions to the keys; zeros if there are none."""
    if not len(keys):
        return torch.zeros_like(states)
    query, key, value = (tokens @ rest[f"W_{w}.weight"].T for w, tokens in (("q", states), ("k", keys), ("v", keys)))
    return torch.softmax(query @ key.T / math.sqrt(WIDTH), dim=-1) @ value


def random_images() -> list[Tensor]:
    return [random_image(*size, seed=i) for i, size in enumerate(SIZES)]


def imported(folder: Path, family: str, **options: Any) -> tuple[LlavaReward, list[str], list[str]]:
    output = folder / "adapter"
    given: dict[str, Any] = {"perspective": "fidelity", "dtype": "float32", **options}
    made = import_published(folder, str(backbone_folder(family)), output, **given)
    return LlavaReward.from_pretrained(output), made.notes, made.parts


def test_images_of_qwen2_5_vl_are_resized_twice_as_published() -> None:
    """By the bounds of the published code's helper, then by those of its processor."""
    processor = SimpleNamespace(patch_size=14, merge_size=2)
    twice = PatchPreprocessor(processor, 256 * 784, 1280 * 784, PUBLISHED_FIRST_BOUNDS)
    sizes = [(512, 512), (768, 768), (1024, 1024), (1344, 768), (768, 1344), (200, 300), (64, 64)]
    tokens = [324, 729, 1225, 47 * 26, 26 * 47, 13 * 21, 256]
    assert [twice.num_tokens(*size) for size in sizes] == tokens
    once = replace(twice, first_bounds=None)
    assert once.num_tokens(1344, 768) == 47 * 27
    assert fresh_backbone("qwen2_5_vl", template="published").preprocessor.first_bounds == PUBLISHED_FIRST_BOUNDS
    assert fresh_backbone("qwen2_5_vl").preprocessor.first_bounds is None


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_model_scores_as_the_published_code_does(family: str, tmp_path: Path) -> None:
    """In one batch, with the same keys of SkipCA in each row."""
    files, images = published(family), random_images()
    reward_model, notes, parts = imported(write(tmp_path, files), family)
    config = reward_model.config()
    assert (config.perspective, config.temperature, config.head) == ("fidelity", TAU, "scalar")
    assert (config.lora_rank, config.lora_alpha, config.template) == (RANK, ALPHA, "published")
    how = config.skip_ca_keys if config.skip_ca else "none"
    assert how == (VARIANTS[family].skip_ca_keys or "none")
    expected = slow_outputs(family, files, images, skip_ca=how)[:, 0]
    assert expected.std() > 0.1
    assert_close(reward_model.score(images, PROMPTS).double(), expected, rtol=0, atol=1e-4)
    ratio = reward_model.compare(images[:2], images[1:], PROMPTS[:2]).logit()
    assert ratio.abs().max() > 0.1
    assert any("the last token" in note for note in notes)
    assert any("never ran it for this family" in note for note in notes) == (not config.skip_ca)
    assert not any("untrained" in part for part in parts)


@pytest.mark.parametrize("family", [family for family in FAMILIES if VARIANTS[family].skip_ca_keys])
def test_skip_ca_keys_can_be_set_to_the_papers(family: str, tmp_path: Path) -> None:
    files, images = published(family), random_images()
    write(tmp_path, files)
    reward_model, _, _ = imported(tmp_path, family, skip_ca_keys="visual")
    assert reward_model.config().skip_ca_keys == "visual"
    expected = slow_outputs(family, files, images, skip_ca="visual")[:, 0]
    assert_close(reward_model.score(images, PROMPTS).double(), expected, rtol=0, atol=1e-4)
    as_published = slow_outputs(family, files, images, skip_ca=VARIANTS[family].skip_ca_keys or "")[:, 0]
    assert (expected - as_published).abs().max() > 1e-3  # or the test would not tell them apart


def test_an_image_alone_in_a_batch_scores_the_same_with_and_without_phis_padding(tmp_path: Path) -> None:
    write(tmp_path / "one", published("phi3_v"))
    write(tmp_path / "two", published("phi3_v"))
    loose, strict = (
        imported(tmp_path / "one", "phi3_v")[0],
        imported(tmp_path / "two", "phi3_v", skip_ca_keys="visual")[0],
    )
    one = loose.score(random_images(), PROMPTS, batch_size=1)
    assert_close(one, strict.score(random_images(), PROMPTS), rtol=0, atol=2e-5)
    assert (loose.score(random_images(), PROMPTS) - one).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_without_skip_ca_and_with_two_outputs_it_compares_as_published(family: str, tmp_path: Path) -> None:
    files, images = published(family, skip_ca=False, general_preference=True), random_images()
    write(tmp_path, files, add_cross_attention=False, is_general_preference=True)
    reward_model, _, _ = imported(tmp_path, family)
    outputs = slow_outputs(family, files, images, skip_ca="none")
    other = outputs[[1, 2, 0]]
    expected = (outputs[:, 0] * other[:, 1] - outputs[:, 1] * other[:, 0]) / TAU
    found = reward_model.logits(
        images, [images[i] for i in (1, 2, 0)], PROMPTS, second_prompts=[PROMPTS[i] for i in (1, 2, 0)]
    )
    assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_untrained_parts_are_reported(tmp_path: Path) -> None:
    """As with the published trainer, whose optimiser held only the LoRA."""
    files = published("phi3_v")
    start = {f"W_{w}.weight": drawn(WIDTH, WIDTH, seed=i, scale=1 / (WIDTH + 1)) for i, w in enumerate("qkv")}
    start["value_head.weight"] = drawn(1, WIDTH, seed=7, scale=1 / (WIDTH + 1))
    start["ca_layernorm.weight"] = torch.ones(WIDTH)
    own = fresh_backbone("phi3_v").projector.state_dict()
    start |= {VARIANTS["phi3_v"].projector + name: tensor for name, tensor in own.items()}
    _, _, parts = imported(write(tmp_path, {**files, "pytorch_model.bin": start}), "phi3_v")
    outputs = {part.split()[0]: part.endswith(": looks untrained") for part in parts}
    weights = ["head.weight", *(f"skip_ca.{name}.weight" for name in ("query", "key", "value"))]
    assert outputs == {**dict.fromkeys([*weights, "skip_ca.norm", "projector"], True), "lora": False}


def test_bfloat16_weights_are_kept_and_names_of_later_versions_are_supported(tmp_path: Path) -> None:
    files = {name: {k: v.bfloat16() for k, v in tensors.items()} for name, tensors in published("qwen2_5_vl").items()}
    renamed = {f"base_model.model.{key}": tensor for key, tensor in files["lora/adapter_model.bin"].items()}
    rest = {f"model.{k}" if k.startswith("visual") else k: t for k, t in files["pytorch_model.bin"].items()}
    write(tmp_path / "old", files)
    write(tmp_path / "new", {"lora/adapter_model.bin": renamed, "pytorch_model.bin": rest})
    old, new = (imported(tmp_path / name, "qwen2_5_vl")[0].score(random_images(), PROMPTS) for name in ("old", "new"))
    assert torch.equal(old, new)
    sizes = [(tmp_path / name / "adapter" / "llava_reward.safetensors").stat().st_size for name in ("old", "new")]
    assert sizes[0] == sizes[1] < 2.5 * sum(t.numel() for tensors in files.values() for t in tensors.values()) + 20000


# --- errors ------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general_preference_tau": 0}, "general_preference_tau is 0; it must be a positive number"),
        ({"add_cross_attention": "yes"}, "add_cross_attention is 'yes'; it must be true or false"),
        ({"is_general_preference": True, "value_head_dim": 4}, "value_head_dim is 4"),
        ({"tau": 0.1}, "the setting tau is unknown"),
    ],
)
def test_wrong_settings_are_named_with_their_file(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, published("phi3_v"), **change)
    with pytest.raises(ValueError, match=rf"reward_config\.yaml: {message}"):
        imported(tmp_path, "phi3_v")


@pytest.mark.parametrize(
    "name", ["reward_config.yaml", "pytorch_model.bin", "lora/adapter_config.json", "lora/adapter_model.bin"]
)
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    write(tmp_path, published("phi3_v"))
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"There is no .*{name}"):
        imported(tmp_path, "phi3_v")


def test_tensors_that_do_not_fit_the_base_model_are_named(tmp_path: Path) -> None:
    files = published("phi3_v")
    rest = files["pytorch_model.bin"]
    first = "model.layers.0.self_attn.qkv_proj.lora_A.weight"
    vision = "model.vision_embed_tokens.img_projection.0.lora_A.weight"
    for file, changes, message in (
        ("pytorch_model.bin", {"value_head.weight": torch.zeros(1, 7)}, r"value_head.weight is \(1, 7\); .* \(1, 32\)"),
        ("pytorch_model.bin", {"W_z.weight": torch.zeros(1)}, "holds W_z.weight, which is no tensor"),
        ("pytorch_model.bin", {"W_k.weight": None}, "no tensor for skip_ca.key.weight"),
        ("pytorch_model.bin", {"W_k.weight": rest["W_k.weight"] * torch.nan}, "W_k.weight holds values that are not"),
        ("lora/adapter_model.bin", {first: torch.zeros(3, 32)}, rf"{first} is \(3, 32\)"),
        ("lora/adapter_model.bin", {vision: torch.zeros(2, 64)}, f"holds {vision}, which is no tensor"),
    ):
        broken = {file: {k: t for k, t in {**files[file], **changes}.items() if t is not None}}
        write(tmp_path, {**files, **broken})
        with pytest.raises(ValueError, match=message):
            imported(tmp_path, "phi3_v")


def test_code_in_a_checkpoint_is_never_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, published("phi3_v"))
    torch.save({"value_head.weight": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds other objects than tensors"):
        imported(tmp_path, "phi3_v")
    assert "run" not in capsys.readouterr().out


def test_a_lora_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path, published("phi3_v"))
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    with pytest.raises(ValueError, match=r"adapter_config\.json: use_dora is True; only False is supported"):
        imported(tmp_path, "phi3_v")


def test_a_base_of_another_family_is_refused(tmp_path: Path) -> None:
    write(tmp_path, published("phi3_v"))
    with pytest.raises(ValueError, match="is of type 'llava'; published checkpoints are of phi3_v, qwen2_5_vl"):
        import_published(tmp_path, str(backbone_folder("llava")), tmp_path / "out", perspective="safety")
    with pytest.raises(ValueError, match="no tensor of a reward model of this family"):
        imported(tmp_path, "qwen2_5_vl")


def test_the_command_imports_and_prints_its_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, published("phi3_v"))
    arguments = [str(tmp_path), "--base", str(backbone_folder("phi3_v")), "--output", str(tmp_path / "out")]
    main([*arguments, "--perspective", "safety"])
    printed = capsys.readouterr().out
    assert "skip_ca_keys is visual_and_padding" in printed
    assert "projector " in printed
    assert read_config(tmp_path / "out").perspective == "safety"
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--perspective", "safety"])
    assert ended.value.code == 1
    assert "already holds a reward model" in capsys.readouterr().err
