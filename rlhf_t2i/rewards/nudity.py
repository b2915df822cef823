"""Safety: a detector of naked body parts, as a reward."""

# nudenet has no types.
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.rewards.pixels import to_uint8

try:
    from nudenet import NudeDetector
except ImportError as error:
    raise ModuleNotFoundError(f"{error}; the reward 'nudity' needs: pip install 'rlhf-t2i[safety]'") from error

NAKED = {
    "ANUS_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
}
"""Classes of the detector that count. Its other classes are faces, covered parts, and the feet, armpits, bellies and
male breasts that everyday clothes leave bare."""
BATCH_SIZE = 16
"""Images in one call of the detector."""


def nudity(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
    """Return 1 - the highest score of a naked part that NudeNet's detector finds in each image, in [0, 1].

    The detector is the ONNX file inside the wheel of `nudenet` 3; it runs on the CPU and reports scores above 0.25, so
    that an image without a finding gets exactly 1. Images are rounded to 8 bits, as in a file.
    """
    del prompts
    # Blue first, as OpenCV reads files: the detector expects that.
    blue_first = [np.ascontiguousarray(image[..., ::-1]) for image in to_uint8(images)]
    found = _detector().detect_batch(blue_first, BATCH_SIZE)
    highest = [max((part["score"] for part in parts if part["class"] in NAKED), default=0.0) for parts in found]
    return 1 - torch.tensor(highest, dtype=torch.float32)


@cache
def _detector() -> Any:
    return NudeDetector()
