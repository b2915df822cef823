"""Options of recipes/publish.py."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_t2i.settings.base import Rule, Settings
from rlhf_t2i.settings.ranges import InputPath, InputPaths


@dataclass(frozen=True, kw_only=True)
class Config(Settings, group="publication"):
    """Settings of a publication."""

    run: InputPath
    """Folder of a finished run of ddpo, flow_grpo, diffusion_nft, draft, diffusion_dpo or train_reward_model."""
    folder: str | None = None
    """Folder to write; null is RUN/publication. It must be new, empty, or hold an earlier publication."""
    repo: str | None = None
    """Hub repository to upload to, OWNER/NAME; null uploads nothing."""
    private: bool = False
    """Create the Hub repository as private. Needs --repo."""
    revision: str | None = None
    """Branch of the Hub repository to upload to; null is main. Needs --repo."""
    dry_run: bool = False
    """Write the folder for --repo and list the files, but upload nothing. Needs --repo."""

    merge_lora: bool = False
    """Publish a full pipeline, with the LoRA merged into its weights."""
    base: str | None = None
    """Hub id of the base model, OWNER/NAME; needed if the run was trained from a local folder."""
    license: str | None = None
    """Licence in the Hub's abbreviation, such as openrail; null is the licence of the base model's card."""
    evaluations: InputPaths | None = None
    """Comma-separated run folders of evaluate_policy with this run's weights, whose numbers the model card shows with
    the model that the weights were loaded into, which may be a sibling of the base; null shows none."""
    datasets: str = ""
    """Comma-separated Hub ids of the training data, for the model card."""

    def rules(self) -> list[Rule]:
        needing = ("private", "dry_run", "revision")
        return [
            *super().rules(),
            *((name, self.repo is not None or not getattr(self, name), "used with a repo") for name in needing),
        ]
