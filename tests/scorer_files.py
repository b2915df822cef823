"""Scorers of other projects with tiny random weights, in files under their published names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tests.clips import make_clip
from tests.reward_models import QWEN_TEMPLATE, QWEN_TOKENS, WIDTH, save_qwen_preprocessors

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "fox", "two", "blue", "cats", "on", "mat", "cat"]


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return weights large enough for every input to matter; norms near 1."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: t + 1 if "norm" in name.lower() and name.endswith("weight") else t for name, t in drawn.items()}


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def save_tokenizer(folder: Path) -> None:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        bos_token="[CLS]", eos_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip


def open_clip_tensors() -> dict[str, Tensor]:
    """Two blocks a tower; heads of 64, so that the wider tower has two."""
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": (), "token_embedding.weight": (len(WORDS), 64)}
    shapes |= {"positional_embedding": (12, 64), "text_projection": (64, 8), **norm("ln_final", 64)}
    shapes |= {"visual.class_embedding": (128,), "visual.positional_embedding": (5, 128), "visual.proj": (128, 8)}
    shapes |= {"visual.conv1.weight": (128, 3, 8, 8), **norm("visual.ln_pre", 128), **norm("visual.ln_post", 128)}
    for tower, width in (("", 64), ("visual.", 128)):
        for block in range(2):
            start = f"{tower}transformer.resblocks.{block}."
            shapes |= {f"{start}attn.in_proj_weight": (3 * width, width), f"{start}attn.in_proj_bias": (3 * width,)}
            shapes |= {**linear(f"{start}attn.out_proj", width, width), **norm(f"{start}ln_1", width)}
            shapes |= {**norm(f"{start}ln_2", width), **linear(f"{start}mlp.c_fc", 32, width)}
            shapes |= linear(f"{start}mlp.c_proj", width, 32)
    tensors = {name: t + 1 if ".ln_" in name and "weight" in name else t for name, t in draw(shapes).items()}
    return {**tensors, "logit_scale": torch.tensor(3.0), "attn_mask": torch.zeros(12, 12)}


def blip_tensors() -> dict[str, Tensor]:
    """A vision tower of width 64 and a text encoder of width 32 with four heads, two layers each, and the head."""
    start = "blip.visual_encoder."
    shapes: dict[str, tuple[int, ...]] = {f"{start}cls_token": (1, 1, 64), f"{start}pos_embed": (1, 5, 64)}
    shapes |= {f"{start}patch_embed.proj.weight": (64, 3, 8, 8), f"{start}patch_embed.proj.bias": (64,)}
    shapes |= norm(f"{start}norm", 64)
    for block in (f"{start}blocks.{number}." for number in range(2)):
        shapes |= {**norm(f"{block}norm1", 64), **linear(f"{block}attn.qkv", 192, 64)}
        shapes |= {**linear(f"{block}attn.proj", 64, 64), **norm(f"{block}norm2", 64)}
        shapes |= {**linear(f"{block}mlp.fc1", 48, 64), **linear(f"{block}mlp.fc2", 64, 48)}
    start = "blip.text_encoder."
    shapes |= {f"{start}embeddings.word_embeddings.weight": (len(WORDS) + 2, 32)}
    shapes |= {f"{start}embeddings.position_embeddings.weight": (40, 32), **norm(f"{start}embeddings.LayerNorm", 32)}
    for layer in (f"{start}encoder.layer.{number}." for number in range(2)):
        for attention, source in (("attention", 32), ("crossattention", 64)):
            shapes |= linear(f"{layer}{attention}.self.query", 32, 32)
            shapes |= {
                **linear(f"{layer}{attention}.self.key", 32, source),
                **linear(f"{layer}{attention}.self.value", 32, source),
            }
            shapes |= {
                **linear(f"{layer}{attention}.output.dense", 32, 32),
                **norm(f"{layer}{attention}.output.LayerNorm", 32),
            }
        shapes |= {**linear(f"{layer}intermediate.dense", 48, 32), **linear(f"{layer}output.dense", 32, 48)}
        shapes |= norm(f"{layer}output.LayerNorm", 32)
    widths = (32, 24, 16, 8, 4, 1)
    for i, number in enumerate((0, 2, 4, 6, 7)):
        shapes |= linear(f"mlp.layers.{number}", widths[i + 1], widths[i])
    unused = {
        "blip.vision_proj.weight": torch.zeros(4, 64),
        "blip.text_encoder.embeddings.position_ids": torch.arange(40),
    }
    return {**draw(shapes), **unused}


def aesthetic_tensors() -> dict[str, Tensor]:
    """Five linear layers on the 16 numbers of a tiny CLIP's embedding."""
    widths, shapes = (16, 12, 8, 6, 4, 1), dict[str, tuple[int, ...]]()
    for i, number in enumerate((0, 2, 4, 6, 7)):
        shapes |= linear(f"layers.{number}", widths[i + 1], widths[i])
    return draw(shapes)


def save_scorers(root: Path) -> None:
    """Save clip/ in transformers' layout, hps/ in open_clip's, image_reward/ and aesthetic/ as published."""
    make_clip(root / "clip")
    shutil.copytree(root / "clip", root / "aesthetic")
    torch.save(aesthetic_tensors(), root / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth")
    for name, file in (("hps", "HPS_v2.1_compressed.pt"), ("image_reward", "ImageReward.pt")):
        (root / name).mkdir()
        save_tokenizer(root / name)
        tensors = open_clip_tensors() if name == "hps" else blip_tensors()
        torch.save({"epoch": 1, "state_dict": tensors} if name == "hps" else tensors, root / name / file)
    settings = {"num_attention_heads": 4, "layer_norm_eps": 1e-12}
    (root / "image_reward" / "med_config.json").write_text(json.dumps(settings))


def published(name: str) -> str:
    """The name of a tensor in the published file."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def save_hps_v3(root: Path) -> None:
    """Save HPSv3.safetensors and the files of a tiny Qwen2-VL."""
    root.mkdir(exist_ok=True)
    config: Any = Qwen2VLConfig(
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 14},
        text_config={
            "vocab_size": len(QWEN_TOKENS), "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        },
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    save_qwen_preprocessors(root, QWEN_TEMPLATE, patch_size=14)
    config.save_pretrained(root)
    config.text_config.vocab_size += 1  # of the reward token
    model = Qwen2VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        published(name): 0.3 * torch.randn(t.shape, generator=generator) + ("norm" in name or "ln_q" in name)
        for name, t in model.state_dict().items()
    }
    for number, rows, columns in ((0, 12, WIDTH), (3, 6, 12), (5, 2, 6)):
        tensors[f"rm_head.{number}.weight"] = 0.3 * torch.randn(rows, columns, generator=generator)
        tensors[f"rm_head.{number}.bias"] = 0.3 * torch.randn(rows, generator=generator)
    save_file(tensors, root / "HPSv3.safetensors")
