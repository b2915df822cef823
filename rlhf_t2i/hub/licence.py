"""The licence of a base model, and warnings if it does not allow derivatives."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # from its HTTP client

from rlhf_t2i.hub.base import Base

_NO_DERIVATIVES = {
    "cc-by-nd-4.0": "Creative Commons Attribution-NoDerivatives 4.0 International",
    "cc-by-nc-nd-4.0": "Creative Commons Attribution-NonCommercial-NoDerivatives 4.0 International",
    "cc-by-nc-nd-3.0": "Creative Commons Attribution-NonCommercial-NoDerivatives 3.0 Unported",
}


@dataclass(frozen=True, slots=True)
class Licence:
    """Licence of a base model in the fields of a Hub model card; None where unknown."""

    id: str | None = None
    name: str | None = None
    link: str | None = None

    @property
    def warnings(self) -> list[str]:
        """Reasons not to publish a derivative, as sentences; empty if there are none."""
        if self.id is None:
            return ["The licence of the base model is unknown, so the terms of use of this model are unknown too."]
        label = self.name if self.id == "other" and self.name else self.id
        if "nd" in label.lower().split("-"):
            text = _NO_DERIVATIVES.get(label.lower(), label)
            return [f"The licence of the base model, {text} ({label}), forbids publishing derivatives such as this."]
        return []


def find_licence(base: Base, *, named: str | None, api: HfApi) -> Licence:
    """Return the licence `named`, or else that of the base model's card on the Hub or in its folder."""
    data: Any = {"license": named} if named is not None else None
    if named is None and base.hub_id is not None:
        # A missing repository, a missing network and a private one all leave the licence unknown.
        with contextlib.suppress(HTTPError, OSError):
            data = api.model_info(base.hub_id).card_data
    elif named is None and (Path(base.source) / "README.md").is_file():
        data = ModelCard.load(Path(base.source) / "README.md", ignore_metadata_errors=True).data
    return Licence(*(data.get(key) for key in ("license", "license_name", "license_link"))) if data else Licence()
