"""Publish what a run has learnt: a folder, or a Hub repository, that strangers can use.

    python recipes/publish.py --run runs/ddpo-DATE                                   only a folder, to look at
    python recipes/publish.py --run runs/ddpo-DATE --repo OWNER/NAME --private       the same, and its upload

A LoRA, a tuned denoiser in its pipeline, or a judge, as safetensors; with a model card that says how to load it, what
it is worth and how it was made, images before and after, curves, and checksums. The upload is one commit. Its token
is HF_TOKEN's or that of `hf auth login`.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.publish import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

from pathlib import Path

from tqdm import tqdm

from rlhf_t2i.config import names
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
    main(config)
