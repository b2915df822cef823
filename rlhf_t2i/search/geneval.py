"""The image folders that GenEval's own scorer expects (Ghosh et al., arXiv:2310.11513), one for each prompt.

00000/metadata.jsonl       the line of the prompt, unchanged
00000/samples/0000.png     its images
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.run_folder import PROMPT_METADATA, SEARCH_SAMPLES
from rlhf_t2i.prompt_rows import Prompt, metadata_of
from rlhf_t2i.rewards.geneval_rows import parse_row


def rows_to_write(prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the metadata to write beside the images of each prompt, its row.

    Raises ValueError, with its place, for a row with `include` that GenEval's scorer could not use.
    """
    rows = metadata_of(prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        if "include" in row:
            try:
                parse_row(row)
            except ValueError as error:
                where = prompt.where if isinstance(prompt, Prompt) else repr(prompt)
                raise ValueError(f"{where} cannot be scored by GenEval: {error}") from error
    return rows


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Make the folder of a prompt, with its metadata and an empty folder for its images."""
    (folder / SEARCH_SAMPLES).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PROMPT_METADATA, json.dumps(dict(metadata)))
