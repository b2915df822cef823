"""How well the text that an image is asked for can be read in it (the OCR reward of Flow-GRPO, arXiv:2505.05470)."""

# rapidocr and rapidfuzz are an extra.
# pyright: reportMissingImports=false
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.rewards.pixels import to_uint8

_QUOTATION = re.compile(r'"([^"]*)"|\u201c([^\u201d]*)\u201d')


class ReaderReward:
    """1 - distance / length of the text that an image should show, in [0, 1], with any reader of text.

        distance = 0 if the target is within what is read, else min(Levenshtein(target, read), len(target))

    The target is the field `text` of the prompt's row, else the first quotation of the prompt; both texts are compared
    in lower case and without blanks.
    """

    def __init__(self, read: Callable[[Float[Tensor, "B 3 Y X"]], Sequence[str]]) -> None:
        """Take a function of images that returns the text in each of them.

        Raises ModuleNotFoundError, with the command that installs it, without rapidfuzz.
        """
        _require("rapidfuzz")
        self._texts = read

    @staticmethod
    def check_row(metadata: Mapping[str, Any]) -> None:
        target_text(metadata)

    def __call__(
        self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Float[Tensor, " B"]:
        """Return the scores; a reader that fails is an error, and an image in which nothing is read has 0."""
        del prompts
        pairs = zip(self._texts(images), metadata, strict=True)
        return torch.tensor([text_score(text, target_text(row)) for text, row in pairs])


class OcrReward(ReaderReward):
    """The score of what PP-OCR reads: all texts that it finds in an image, from top to bottom, as one."""

    def __init__(self, *, min_side: int = 736) -> None:
        """Load PP-OCR (models in the package rapidocr) for the CPU; nothing is downloaded.

        `min_side`: an image with a shorter side in pixels is enlarged to it before text is looked for. Less is faster.
        Raises ModuleNotFoundError, with the command that installs them, without the packages of the extra `ocr`.
        """
        super().__init__(lambda images: [self.read(image) for image in images])
        _require("rapidocr")
        from rapidocr import RapidOCR

        self._read = RapidOCR(
            params={
                "Global.log_level": "error",  # it warns of every image without text
                "Global.use_cls": False,  # so that text upside down is not read as if it stood upright
                "Det.limit_side_len": min_side,
                "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
            }
        )

    def read(self, image: Float[Tensor, "3 Y X"]) -> str:
        """Return the texts in an image, from top to bottom."""
        blue_first = np.ascontiguousarray(to_uint8(image)[..., ::-1])  # OpenCV's order
        result: Any = self._read(blue_first)
        return "".join(result.txts or ())


def _require(package: str) -> None:
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; the reward ocr needs: pip install 'rlhf-t2i[ocr]'") from error


def text_score(read: str, target: str) -> float:
    """Return 1 - distance / length, as `OcrReward`; the target is not empty."""
    from rapidfuzz.distance import Levenshtein

    read, target = _plain(read), _plain(target)
    distance = 0 if target in read else min(Levenshtein.distance(target, read), len(target))
    return 1 - distance / len(target)


def target_text(metadata: Mapping[str, Any]) -> str:
    """Return the text that an image should show; ValueError for a row that has none."""
    text = metadata.get("text")
    if text is None:
        quotation = _QUOTATION.search(str(metadata["prompt"]))
        if quotation is None:
            raise ValueError(
                f"it has no 'text', and its prompt {metadata['prompt']!r} quotes none; give one of them, as in "
                f"'a sign that says \"FOX\"'."
            )
        text = quotation[1] or quotation[2] or ""
    if not isinstance(text, str) or not _plain(text):
        raise ValueError(f"the text that an image should show is {text!r}; it must be letters.")
    return text


def _plain(text: str) -> str:
    return "".join(text.split()).lower()
