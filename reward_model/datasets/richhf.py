"""RichHF-18K (Liang et al., arXiv:2312.10240): four scores of single images from Pick-a-Pic v1.

    filename   artifact_score   misalignment_score   overall_score   aesthetics_score
    artifact_map, misalignment_map, prompt_misalignment_label: locations and words of flaws; not used

Higher is better for every score, including those named after a flaw: artifact_score 1 is an image without artifacts. A
score becomes a label by a threshold that the user gives.

It is published as TFRecords without images and prompts. `filename` is looked up under the image root; the prompt is
the field `prompt` or `caption` if there is one, or else the text file beside the image (a.txt of a.png).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from reward_model.datasets.fields import BadRecordError, check_keys, take_image, take_number, take_text
from reward_model.datasets.images import FindImage, text_beside
from reward_model.stored_images import ImageSource
from reward_model.types import LabelledImage, Record

Score = Literal["alignment", "artifact", "overall", "aesthetics"]
SCORE_OF: Mapping[str, str] = {
    "alignment": "misalignment_score",
    "artifact": "artifact_score",
    "overall": "overall_score",
    "aesthetics": "aesthetics_score",
}
MAPS = frozenset({"artifact_map", "misalignment_map"})


def richhf_record(
    fields: Mapping[str, Any], *, find_image: FindImage, where: str, score: Score, threshold: float
) -> list[Record]:
    """Convert a row to a labelled image: 1 if the score is at least the threshold. Only alignment needs a prompt."""
    image = "image" if fields.get("image") is not None else "filename"
    check_keys(
        fields,
        needed={image, SCORE_OF[score]},
        optional={"prompt", "caption"},
        ignored={*SCORE_OF.values(), *MAPS, "prompt_misalignment_label", "filename", "image"},
    )
    label = int(take_number(fields, SCORE_OF[score]) >= threshold)
    file = find_image(take_image(fields, image))
    prompt = _prompt(fields, file)
    if score == "alignment" and not prompt:
        raise BadRecordError(
            f"there is no prompt, which alignment needs. Add a column 'prompt' from Pick-a-Pic's captions, or write it "
            f"to {file.with_suffix('.txt') if isinstance(file, Path) else 'the column prompt'}."
        )
    return [LabelledImage(file, prompt, label, where)]


def _prompt(fields: Mapping[str, Any], file: ImageSource) -> str:
    for key in ("prompt", "caption"):
        if fields.get(key) is not None:
            return take_text(fields, key)
    return text_beside(file)
