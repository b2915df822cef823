"""Publish what a run has learnt: a folder, or a Hub repository, that strangers can use.

    python recipes/publish.py --run runs/ddpo-DATE                                   only a folder, to look at
    python recipes/publish.py --run runs/ddpo-DATE --repo OWNER/NAME --private       the same, and its upload

A LoRA, a tuned denoiser in its pipeline, or a judge, as safetensors; with a model card that says how to load it, what
it is worth and how it was made, images before and after, curves, and checksums. The upload is one commit. Its token
is HF_TOKEN's or that of `hf auth login`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from rlhf_t2i.config import check, names, parse_config
from rlhf_t2i.hub.base import find_base
from rlhf_t2i.hub.publication import (
    is_full_pipeline,
    list_files,
    new_publication,
    write_checksums,
    write_training_record,
    write_weights,
)
from rlhf_t2i.training.finished_run import read_run


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields in the order of the flow."""

    run: str
    """The folder of a finished run: of ddpo, flow_grpo, draft, diffusion_dpo or train_reward_model."""
    folder: str | None = None
    """What to write; null is RUN/publication. It must be new, empty, or hold an earlier publication."""
    repo: str | None = None
    """OWNER/NAME on the Hub; nothing is uploaded without it."""
    private: bool = False
    """Make the repository a private one."""
    revision: str | None = None
    """A branch to publish to; null is main."""
    dry_run: bool = False
    """Write the folder for `repo`, say what would be uploaded, and upload nothing."""

    merge_lora: bool = False
    """Publish a LoRA as a whole pipeline, with the LoRA in its weights."""
    base: str | None = None
    """OWNER/NAME on the Hub of the model that was tuned, where the run names a folder of this machine."""
    license: str | None = None
    """As the Hub abbreviates it, such as openrail; null carries over what the card of the base says."""
    datasets: str = ""
    """Comma-separated Hub ids of the data that it learnt from, for the card."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming them."""
        for name in ("private", "dry_run", "revision"):
            check(self, [(name, self.repo is not None or not getattr(self, name), "used with a repo")])


def main(config: Config) -> Path:
    """Read the run, write the publication, upload it; returns the folder of the publication."""
    from rlhf_t2i.hub.licence import find_licence  # imports huggingface_hub
    from rlhf_t2i.hub.model_card import write_card
    from rlhf_t2i.hub.upload import check_no_tokens, check_repo_id, hub_api, upload

    for repo in (config.repo, config.base):
        if repo is not None:
            check_repo_id(repo)
    run, api = read_run(Path(config.run)), hub_api()
    base, full_pipeline = find_base(run, hub_id=config.base), is_full_pipeline(run, merge_lora=config.merge_lora)
    licence = find_licence(base, named=config.license, api=api)
    for warning in licence.warnings:
        tqdm.write(f"WARNING: {warning}{' Name it by --license.' if licence.id is None else ''}")
    target = Path(config.folder) if config.folder else run.folder / "publication"
    with new_publication(target) as folder:
        write_weights(run, base, folder, merge_lora=config.merge_lora)
        write_card(
            run, base, licence, folder,
            repo=config.repo, revision=config.revision, full_pipeline=full_pipeline,
            curves=write_training_record(run, folder), datasets=names(config.datasets),
        )  # fmt: skip
        check_no_tokens(folder)
        write_checksums(folder)
    for name in list_files(target):
        tqdm.write(f"{(target / name).stat().st_size:>13,}  {name}")
    tqdm.write(f"folder    {target}")
    if config.repo and config.dry_run:
        tqdm.write(f"These files would be one commit to {config.repo}; nothing was uploaded.")
    elif config.repo:
        commit = upload(target, config.repo, private=config.private, revision=config.revision, api=api, log=tqdm.write)
        tqdm.write(f"published {commit}")
    return target


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__ or ""))
