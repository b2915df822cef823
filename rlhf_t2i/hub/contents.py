"""Checks of the files of a publication: each is what its suffix says, and none holds a key."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import get_token

from reward_model.image_files import open_image
from reward_model.text_files import parse_json, read_json, read_yaml
from rlhf_t2i.access import TOKEN_VARIABLE
from rlhf_t2i.hub.publication import list_files
from rlhf_t2i.training.finished_run import check_safetensors

_KEYS = {
    "an access token of the Hub": r"\bhf_[A-Za-z0-9]{30,}",
    "a key of Anthropic": r"\bsk-ant-[\w-]{20,}",
    "a key of OpenAI": r"\bsk-(?!ant-)[\w-]{20,}",
    "a key of Weights & Biases": r"(?i)\bwandb_v\d_\w{20,}|wandb[^\n]{0,40}?\b[0-9a-f]{40}\b",
    "a key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|(?i:aws_secret_access_key)\W{1,5}[A-Za-z0-9/+]{40}",
    "a token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{22,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
"""Shapes of keys, by what they are."""


def check_no_keys(folder: Path) -> None:
    """Raise ValueError, naming file and line, if a publication contains a key of a known shape or an own token."""
    own = [token for token in (get_token(), os.environ.get(TOKEN_VARIABLE, "").strip()) if token]
    shapes = {**_KEYS, "a token of this machine": "|".join(map(re.escape, own)) or "(?!)"}
    for name in list_files(folder):
        text = _head(folder / name) if name.endswith(".safetensors") else (folder / name).read_bytes()
        for kind, shape in shapes.items():
            if found := re.search(shape.encode(), text):
                line = text.count(b"\n", 0, found.start()) + 1
                raise ValueError(
                    f"{name}:{line} contains {kind}, perhaps from the command or config of the run. Remove it from the "
                    f"run folder."
                )


def check_kinds(folder: Path) -> None:
    """Raise ValueError, naming the file, unless each file of a publication is of the kind that its suffix says."""
    for name in list_files(folder):
        path = folder / name
        try:
            match path.suffix:
                case ".safetensors":
                    check_safetensors(path)
                case ".png":
                    with open_image(path, formats=("PNG",)) as image:
                        image.verify()
                case ".json":
                    read_json(path, allow_nan=True)
                case ".jsonl":
                    for line in path.read_text(encoding="utf-8").splitlines():
                        parse_json(line, allow_nan=True)
                case ".yaml":
                    read_yaml(path)
                case ".md" | ".html" | ".svg" | ".txt" | ".jinja":
                    path.read_text(encoding="utf-8")
                case _:
                    pass
        except Exception as error:  # Pillow raises any type of exception on broken bytes
            raise ValueError(f"{name} is no {path.suffix[1:]} file, so it is not published: {error}") from error


def _head(path: Path) -> bytes:
    """Return the header of a safetensors file, which has its metadata."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))
