"""A GenEval prompt file with one line of each kind, and its models with random weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from rlhf_t2i.rewards.geneval_rows import CLASSES, NAMES_IN_COCO
from tests.clips import make_clip

LINES: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 3}],
        "exclude": [{"class": "clock", "count": 4}],
        "prompt": "a photo of three clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "tie", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a tie right of a dog",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red cat and a blue dog",
    },
]


def write_prompts(folder: Path, rows: list[Any]) -> Path:
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def make_geneval_models(folder: Path) -> None:
    """Save detector/ and clip/ with random weights."""
    make_detector(folder / "detector")
    make_clip(folder / "clip", num_tokens=40)


def make_detector(folder: Path, classes: Sequence[str] = CLASSES) -> None:
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    labels = {index: NAMES_IN_COCO.get(name, name) for index, name in enumerate(classes)}
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, dim_feedforward=16, num_attention_heads=2, num_queries=8, id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
