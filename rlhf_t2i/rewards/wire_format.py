"""Wire format between a trainer and a reward server: images and prompts one way, scores the other; never pickle.

`POST /score` takes images in one of two forms, chosen by its Content-Type:

    application/x-safetensors   a safetensors file with the tensor `images`, B 3 Y X, float32 or float16 in [0, 1] or
                                uint8 in 0..255, and in its metadata `prompts`: a JSON list of B strings; if rewards
                                need it also `metadata`: a JSON list of B objects, the row of each prompt
    application/json            {"prompts": ["a fox"], "images": ["PNG in base64"]}, images of one size, RGB or gray;
                                if rewards need it also "metadata": [{"prompt": "a fox", "text": "FOX"}]

and returns {"total": [0.5], "scores": {"llava_reward": [0.5]}}: the weighted sum and the unweighted scores of each
reward, one number per image. A number that JSON cannot hold is the string "nan", "inf" or "-inf". An error is
{"error": "the reason"} with a 4xx status if the request is at fault and a 5xx status otherwise. A server with a token
requires the header `Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import base64
import io
import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from reward_model.image_files import open_image
from reward_model.text_files import parse_json
from rlhf_t2i.prompt_rows import Prompt

SAFETENSORS, JSON = "application/x-safetensors", "application/json"
PIXELS = (torch.float32, torch.float16, torch.uint8)
"""Storage types of pixels; float32 is lossless."""
MAX_METADATA_BYTES = 2**20
"""Largest size of the rows of a request, as JSON."""


class TooLargeError(ValueError):
    """A request larger than the server accepts."""


def pack(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str], *, pixels: torch.dtype = torch.float32) -> bytes:
    """Return the body of a request of type SAFETENSORS; images are stored as `pixels`, one of PIXELS.

    Rows are sent if a prompt has more than its text. Raises TooLargeError if they exceed MAX_METADATA_BYTES as JSON.
    """
    images = images.detach()
    if pixels == torch.uint8:
        images = (images.float().clamp(0, 1) * 255).round()
    stored = images.to("cpu", pixels).contiguous()
    metadata = {"prompts": json.dumps(list(prompts))}
    rows = [prompt.metadata if isinstance(prompt, Prompt) else {"prompt": prompt} for prompt in prompts]
    if any(row.keys() - {"prompt"} for row in rows):
        metadata["metadata"] = json.dumps(rows)
        _check_metadata_bytes(len(metadata["metadata"]))
    return save({"images": stored}, metadata=metadata)


def unpack(
    body: bytes, content_type: str, *, max_images: int, max_bytes: int
) -> tuple[Float[Tensor, "B 3 Y X"], list[str]]:
    """Return the images of a request, float32, and their prompts, with their rows if it has some.

    Raises TooLargeError for more than `max_images` images, more than `max_bytes` bytes of them as float32 or rows of
    more than MAX_METADATA_BYTES, and ValueError for a body that breaks the format.
    """
    match content_type.partition(";")[0].strip().lower():
        case "application/x-safetensors":
            images, prompts, rows = _from_safetensors(body)
        case "application/json":
            images, prompts, rows = _from_json(body)
        case other:
            raise ValueError(f"The content type is {other!r}; it must be {SAFETENSORS} or {JSON}.")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("The prompts must be a JSON list of strings.")
    if not len(prompts) == len(images) >= 1:
        raise ValueError(f"There are {len(images)} images and {len(prompts)} prompts; each image needs its own.")
    if len(images) > max_images:
        raise TooLargeError(f"There are {len(images)} images; a request may have at most {max_images} (--max_images).")
    if rows is not None:
        prompts = _with_metadata(prompts, rows)
    if isinstance(images, Tensor):
        _check_bytes(images.numel(), max_bytes)
        return (images.float() / 255 if images.dtype == torch.uint8 else images.float()), prompts
    return _decoded(images, max_bytes=max_bytes), prompts


def numbers(scores: Float[Tensor, " B"]) -> list[float | str]:
    """Return scores as JSON values; a score that is not finite becomes a string that `float` parses."""
    return [score if math.isfinite(score) else str(score) for score in scores.tolist()]


def totals(response: str) -> Float[Tensor, " B"]:
    """Return the totals of a response, bit for bit; raises ValueError if it has none."""
    try:
        total = parse_json(response)["total"]
        if isinstance(total, list) and all(map(_is_score, total)):
            return torch.tensor([float(score) for score in total], dtype=torch.float32)
    except (ValueError, KeyError, TypeError, OverflowError):
        pass
    raise ValueError("The response is no JSON with a list of numbers as `total`.")


def _is_score(value: Any) -> bool:
    """Return True for a number, and for the texts of those that JSON cannot hold."""
    return value in ("nan", "inf", "-inf") if isinstance(value, str) else type(value) in (int, float)


def _with_metadata(prompts: list[str], rows: Any) -> list[str]:
    """Return prompts with their rows; ValueError unless there is one JSON object for each."""
    if not isinstance(rows, list) or len(rows) != len(prompts):
        raise ValueError(f"The metadata must be a JSON list of {len(prompts)} objects, one for each prompt.")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"The metadata of prompt {index} is a {type(row).__name__}; it must be a JSON object with named fields."
            )
    return [Prompt(prompt, {"prompt": prompt, **row}) for prompt, row in zip(prompts, rows, strict=True)]


def _check_metadata_bytes(count: int) -> None:
    if count > MAX_METADATA_BYTES:
        raise TooLargeError(
            f"The metadata of the prompts has {count / 2**20:.1f} MB as JSON; a request may have at most "
            f"{MAX_METADATA_BYTES / 2**20:g} MB. Leave out fields that no reward needs, or send fewer images at once."
        )


def _from_safetensors(body: bytes) -> tuple[Tensor, Any, Any]:
    try:
        tensors = load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        metadata = header["__metadata__"]
        _check_metadata_bytes(len(metadata.get("metadata", "")))
        prompts, rows = json.loads(metadata["prompts"]), json.loads(metadata.get("metadata", "null"))
    except TooLargeError:
        raise
    except (SafetensorError, RecursionError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The body is no safetensors file with `prompts` in its metadata: {_shown(error)}.") from error
    images = tensors.get("images")
    if images is None or images.dtype not in PIXELS or images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        found = "none" if images is None else f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise ValueError(
            f"The tensor `images` must be float32, float16 or uint8 of shape (B, 3, height, width); it is {found}."
        )
    return images, prompts, rows


def _from_json(body: bytes) -> tuple[list[bytes], Any, Any]:
    try:
        request = json.loads(body)
        images = [base64.b64decode(image, validate=True) for image in request["images"]]
        rows = request.get("metadata")
        _check_metadata_bytes(len(json.dumps(rows)))
        return images, request["prompts"], rows
    except TooLargeError:
        raise
    except (RecursionError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The body is no JSON with `prompts` and `images` in base64: {_shown(error)}.") from error


def _decoded(files: list[bytes], *, max_bytes: int) -> Float[Tensor, "B 3 Y X"]:
    """Decode PNG files to images in [0, 1], after their sizes are checked."""
    try:
        opened = [open_image(io.BytesIO(file), formats=("PNG",)) for file in files]
        if len({image.size for image in opened}) > 1 or not {image.mode for image in opened} <= {"RGB", "L"}:
            found = sorted({f"{image.mode} {image.width} x {image.height}" for image in opened})
            raise ValueError(f"they must be RGB or gray (L) and of one size, but are {', '.join(found)}")
        _check_bytes(3 * sum(image.width * image.height for image in opened), max_bytes)
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in opened])
    except TooLargeError:
        raise
    # These are the exceptions that Pillow raises for broken bytes.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"The PNG images cannot be used: {_shown(error)}.") from error
    # The memory layout of the other form: sums in another order have other last bits.
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255


def _check_bytes(count: int, max_bytes: int) -> None:
    if 4 * count > max_bytes:
        raise TooLargeError(
            f"The images have {4 * count / 2**20:.1f} MB as float32; a request may have at most "
            f"{max_bytes / 2**20:g} MB (--max_body_mb)."
        )


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}, {str(error)[:200]}" if isinstance(error, KeyError) else str(error)[:200]
