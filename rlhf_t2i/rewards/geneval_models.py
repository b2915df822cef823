"""The two models of GenEval: Mask2Former finds objects, CLIP names their colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from rlhf_t2i.rewards.geneval import Detection
from rlhf_t2i.rewards.geneval_rows import CLASSES, COLORS, NAMES_IN_COCO
from rlhf_t2i.rewards.pixels import to_pil

_BACKGROUND = (0x99, 0x99, 0x99)
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class Detector:
    """Instance segmentation by Mask2Former, of the classes of COCO."""

    def __init__(self, source: str, *, batch_size: int) -> None:
        """Load a model from a folder or the Hub; ValueError if it lacks one of GenEval's classes."""
        self.model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(source).eval().requires_grad_(False)
        self.processor: Any = Mask2FormerImageProcessorPil.from_pretrained(source)
        self.batch_size = batch_size
        names = {NAMES_IN_COCO.get(name, name): name for name in CLASSES}
        labels: dict[int, str] = self.model.config.id2label
        if missing := names.keys() - set(labels.values()):
            raise ValueError(
                f"The detector {source!r} has no class {', '.join(sorted(missing))}; it must be trained on COCO."
            )
        self._names = {index: names[label] for index, label in labels.items() if label in names}

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 Y X"], *, threshold: float) -> list[list[Detection]]:
        """Return the objects in each image with a score of at least `threshold`: class probability times mean mask."""
        self.model.to(images.device)
        return [found for part in images.split(self.batch_size) for found in self._detect(part, threshold)]

    def _detect(self, images: Float[Tensor, "B 3 Y X"], threshold: float) -> list[list[Detection]]:
        inputs = self.processor([to_pil(image) for image in images], return_tensors="pt").to(images.device)
        results = self.processor.post_process_instance_segmentation(
            self.model(**inputs),
            threshold=threshold,
            target_sizes=[tuple(images.shape[2:])] * len(images),
            return_binary_maps=True,  # objects may overlap
        )
        return [
            [
                Detection(self._names[info["label_id"]], info["score"], _box_of(mask), mask)
                for info, mask in zip(result["segments_info"], result["segmentation"].bool().cpu(), strict=False)
                if info["label_id"] in self._names
            ]
            for result in results
        ]


class ColorClassifier:
    """Zero-shot classification of colours by CLIP: each object on a grey background, ten colours, three templates."""

    def __init__(self, source: str, *, batch_size: int) -> None:
        """Load a CLIP from a folder or the Hub."""
        self.model: Any = CLIPModel.from_pretrained(source).eval().requires_grad_(False)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        self.processor: Any = CLIPImageProcessorPil.from_pretrained(source)
        self.batch_size = batch_size
        self._weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: Float[Tensor, "3 Y X"], objects: Sequence[Detection], name: str) -> list[str]:
        """Return the colour of each object of one class."""
        self.model.to(image.device)
        crops, colors = [on_grey(image, each) for each in objects], list[str]()
        for start in range(0, len(crops), self.batch_size):
            inputs = self.processor(crops[start : start + self.batch_size], return_tensors="pt").to(image.device)
            features = F.normalize(self.model.get_image_features(**inputs).pooler_output, dim=-1)
            colors += [COLORS[i] for i in (features @ self._weights_of(name).T).argmax(dim=1).tolist()]
        return colors

    def _weights_of(self, name: str) -> Float[Tensor, "C D"]:
        """Return one direction for each colour: the mean of the templates' unit vectors, as a unit vector."""
        if name not in self._weights:
            texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
            inputs = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
            features = F.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)
            self._weights[name] = F.normalize(features.unflatten(0, (len(COLORS), -1)).mean(dim=1), dim=-1)
        return self._weights[name].to(self.model.device)


def on_grey(image: Float[Tensor, "3 Y X"], detection: Detection) -> Image.Image:
    """Return the box of an object, with #999999 outside of its mask."""
    background = Image.new("RGB", (image.shape[2], image.shape[1]), _BACKGROUND)
    mask = Image.fromarray(detection.mask.numpy().astype(np.uint8) * 255)
    return Image.composite(to_pil(image), background, mask).crop(detection.box)


def _box_of(mask: Bool[Tensor, "Y X"]) -> tuple[int, int, int, int]:
    rows, columns = (mask.any(dim=dim).nonzero()[:, 0].tolist() for dim in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
