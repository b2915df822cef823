"""Publish a finished run: a folder, or a Hub repository, with weights, a model card and its training record.

    python recipes/publish.py --run runs/ddpo-DATE
    python recipes/publish.py --run runs/ddpo-DATE --repo OWNER/NAME --private

The first command writes the folder, the second also uploads it, in one commit, with the token in HF_TOKEN or of
`hf auth login`.

The weights are a LoRA, a tuned denoiser within its pipeline, or a reward model, as safetensors. The model card has the
code that loads them, the evaluations, the settings of the training, images before and after it, and curves; checksums
cover all files.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.settings.publish import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

from pathlib import Path

from tqdm import tqdm

from rlhf_t2i.hub.base import find_base
from rlhf_t2i.hub.evaluations import with_evaluations
from rlhf_t2i.hub.local_paths import paths_of, without_paths
from rlhf_t2i.hub.publication import (
    is_full_pipeline,
    list_files,
    new_publication,
    write_checksums,
    write_training_record,
    write_weights,
)
from rlhf_t2i.settings.lists import names
from rlhf_t2i.training.finished_run import read_run


def main(config: Config) -> Path:
    """Read the run, write the publication, upload it; returns the folder of the publication."""
    from rlhf_t2i.hub.contents import check_kinds, check_no_keys  # imports huggingface_hub, as the others do
    from rlhf_t2i.hub.licence import find_licence
    from rlhf_t2i.hub.model_card import write_card
    from rlhf_t2i.hub.upload import check_repo_id, hub_api, upload

    for repo in (config.repo, config.base):
        if repo is not None:
            check_repo_id(repo)
    run, api = with_evaluations(read_run(Path(config.run)), names(config.evaluations or "")), hub_api()
    base, full_pipeline = find_base(run, hub_id=config.base), is_full_pipeline(run, merge_lora=config.merge_lora)
    licence = find_licence(base, named=config.license, api=api)
    for warning in licence.warnings:
        tqdm.write(f"WARNING: {warning}{' Name it by --license.' if licence.id is None else ''}")
    paths = paths_of(run, base.source)
    public = without_paths(run, paths)
    target = Path(config.folder) if config.folder else run.folder / "publication"
    with new_publication(target) as folder:
        write_weights(run, base, folder, merge_lora=config.merge_lora)
        write_card(
            public, base, licence, folder,
            repo=config.repo, revision=config.revision, full_pipeline=full_pipeline,
            curves=write_training_record(public, folder), datasets=names(config.datasets),
        )  # fmt: skip
        paths.hide_in_files(folder)
        check_kinds(folder)
        check_no_keys(folder)
        write_checksums(folder)
    if paths.names:
        tqdm.write(f"shortened {', '.join(f'{path} to {name}' for path, name in paths.names.items())}")
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
    run_command(main, config)
