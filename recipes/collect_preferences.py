"""Collect human preferences: a web page that shows two images of a prompt and stores which is preferred.

    python recipes/collect_preferences.py --runs runs/ddpo-DATE
    python recipes/collect_preferences.py --pairs runs/diffusion_dpo-DATE/pairs
    python recipes/collect_preferences.py --weights base,runs/ddpo-DATE --evaluation_prompts prompts.txt

The images come from the evaluations of finished runs (--runs: before and after training), from preference data
(--pairs), or are sampled from two sets of weights (--weights). Open the printed address in a browser; its page /results
shows the agreement between annotators, and with a reward (--rewards).

Every answer is written before the next pair appears. RUN_FOLDER/pairs.jsonl holds the current preferences, in the
format of `train_reward_model.py --train_data` and `diffusion_dpo.py --pairs`; with --criteria, pairs_CRITERION.jsonl.
The same command with --resume and
--run_folder continues after a stop.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, require, run_command
from rlhf_t2i.settings.collect_preferences import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)
    require("fastapi", "uvicorn", extra="serve")

import gc
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from socket import socket

import torch

from rlhf_t2i.access import TOKEN_VARIABLE, listen, token
from rlhf_t2i.annotation.answers import Answers
from rlhf_t2i.annotation.questions import (
    Candidate,
    Role,
    from_images,
    from_runs,
    read_questions,
    score_questions,
    subsample,
    write_questions,
)
from rlhf_t2i.annotation.records import pairs_file
from rlhf_t2i.annotation.serve import Service, create_app
from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.http_server import listens_on_loopback, make_server
from rlhf_t2i.prompt_rows import EditPrompt
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.rewards.rows import check_prompts
from rlhf_t2i.rewards.trial import try_rewards
from rlhf_t2i.seeds import ANNOTATE, generator_for
from rlhf_t2i.settings.from_run import other_bases
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.ranges import BASE
from rlhf_t2i.training.claim import claim_folder, keep_folder, release_folder

_FREE_TO_CHANGE = {
    "run_folder",
    "resume",
    "rewards",
    "guideline",
    "microbatch_size",
    "host",
    "port",
    "require_token",
    "no_imports",
}
log = partial(print, flush=True)  # so that a program at the end of a pipe gets the address at once
_NUM_SAMPLED = 100
"""Default number of pairs to sample."""
_DECIDED = ("preferred in the file", "not preferred in the file")
_UNDECIDED = ("no preference in the file", "no preference in the file")


def main(config: Config) -> Path:
    """Collect the questions, load earlier answers, serve the page until Ctrl-C or SIGTERM; return the run folder."""
    prompts = load_prompts(config.evaluation_prompts, held_out=True) if config.evaluation_prompts else []
    if edits := [prompt for prompt in prompts if isinstance(prompt, EditPrompt)]:
        raise ValueError(f"{edits[0].where} has an 'image' to edit, which the annotation page does not show.")
    check_prompts(config.rewards or "", prompts)
    reward = load_rewards(config.rewards) if config.rewards else None
    if reward and prompts:
        try_rewards(reward, prompts)
    if reward:
        reward.refuse_groups("the images of a question are scored one by one")
    guideline = Path(config.guideline).read_text(encoding="utf-8") if config.guideline else ""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with listen(config.host, config.port) as listener:
        folder = claim_folder(asdict(config), recipe="preferences", free_to_change=_FREE_TO_CHANGE, checkpoints=False)
        questions = read_questions(folder) or write_questions(
            folder,
            candidates(config, folder, device),
            criteria=names(config.criteria or ""),
            known=known(config),
        )
        keep_folder(folder)
        compared = None
        if reward and config.rewards:
            scores = score_questions(reward, folder, questions, device=device, batch_size=config.microbatch_size)
            compared = config.rewards, scores
        with closing(Answers(folder, questions, seed=config.seed)) as answers:
            if answers.truncated_line:
                log(f"Removed the incomplete last line of {answers.path}, left by a crash: {answers.truncated_line!r}")
            serve(Service(answers, secret=token(), reward=compared, guideline=guideline), listener)
    release_folder(folder)
    return folder


def serve(service: Service, listener: socket) -> None:
    """Print the address of the page, and serve it."""
    app = create_app(service, loopback=listens_on_loopback(listener))
    listener.listen()  # whoever reads the address may connect at once
    folder, (host, port) = service.answers.folder, listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    files = [folder / pairs_file(one) for one in dict.fromkeys(q.criterion for q in service.answers.questions)]
    needs = f" (it requires the token in {TOKEN_VARIABLE})" if service.secret else ""
    log(
        f"pairs     {len(service.answers.questions)}, in {folder}\nanswers   {', '.join(map(str, files))}\n"
        f"page      {address}{needs}\nresults   {address}/results"
    )
    with suppress(KeyboardInterrupt):
        make_server(app, log_level="warning").run(sockets=[listener])


def candidates(config: Config, folder: Path, device: torch.device) -> Iterator[Candidate]:
    """Return the pairs of images that the config selects."""
    if config.weights:
        return sampled(config, device)
    generator = generator_for(config.seed, ANNOTATE)
    if config.pairs:
        return from_files(config, folder, generator)
    folders = [Path(name) for name in names(config.runs or "")]
    return from_runs(folders, num_pairs=config.num_pairs, generator=generator)


def from_files(config: Config, folder: Path, generator: torch.Generator) -> Iterator[Candidate]:
    """Read the pairs of one prompt, ties included, from preference files; their preferences become source names."""
    from reward_model.datasets import load_same_prompt_pairs
    from reward_model.datasets.usable import usable_records
    from reward_model.images import to_tensor
    from reward_model.types import PreferencePair

    skipped = folder / "skipped.jsonl" if config.on_bad_record == "skip" else None
    found = load_same_prompt_pairs(
        names(config.pairs or ""),
        image_root=config.image_root,
        image_prefix=config.image_prefix,
        skipped=skipped,
        log=log,
        keep_ties=True,
        streaming=config.streaming,
    )
    for drawn in subsample(found, config.num_pairs, generator=generator):
        for pair in usable_records([drawn], skipped=skipped):  # one or none
            assert isinstance(pair, PreferencePair)
            sources = _UNDECIDED if pair.tie else _DECIDED
            yield Candidate(pair.winner_prompt, (to_tensor(pair.winner), to_tensor(pair.loser)), sources)


def known(config: Config) -> list[tuple[Role, Candidate]]:
    """Read the questions of the training round and the attention checks; ValueError if there are too few."""
    from reward_model.datasets import load_same_prompt_pairs
    from reward_model.images import to_tensor

    wanted = config.num_training_questions + config.num_attention_checks
    if not wanted:
        return []
    pairs = load_same_prompt_pairs(
        names(config.known_pairs or ""), image_root=config.image_root, image_prefix=config.image_prefix, skipped=None,
        streaming=config.streaming,
    )  # fmt: skip
    if len(pairs) < wanted:
        raise ValueError(
            f"known_pairs has {len(pairs)} pairs of one prompt without ties; the training round and the attention "
            f"checks need {wanted}."
        )
    found: list[tuple[Role, Candidate]] = []
    for i in range(wanted):
        images = to_tensor(pairs[i].winner), to_tensor(pairs[i].loser)
        role: Role = "training" if i < config.num_training_questions else "check"
        found.append((role, Candidate(pairs[i].winner_prompt, images, _DECIDED)))
    return found


def sampled(config: Config, device: torch.device) -> Iterator[Candidate]:
    """Sample the same prompts and seeds with two policies."""
    from rlhf_t2i.diffusion.transitions import stochastic  # these imports take seconds
    from rlhf_t2i.models.load import load_policy
    from rlhf_t2i.training.evaluation import evaluate, evaluation_set
    from rlhf_t2i.types import Sampler

    available, count = load_prompts(config.evaluation_prompts, held_out=True), config.num_pairs or _NUM_SAMPLED
    prompts, seeds = evaluation_set(available, num_images=count, seed=config.evaluation_seed)
    images: list[torch.Tensor] = []
    first, second = names(config.weights or "")
    for name, base in other_bases([first, second], config.model).items():
        log(f"sibling   {name} was trained on {base}; its LoRA is loaded into another base, {config.model}")
    for name in (first, second):
        log(f"sampling  {len(prompts)} images with {name}")
        weights = None if name == BASE else Path(name)
        policy = load_policy(
            config.model,
            device=device,
            weights=weights,
            resolution=config.image_size,
            quantization=config.quantization,
            complex_human_instruction=config.complex_human_instruction,
        )
        schedule = policy.schedule(config.num_evaluation_steps)
        sampler = Sampler(schedule, stochastic(schedule, eta=config.evaluation_eta), config.guidance_scale)
        images.append(
            evaluate(policy, prompts, seeds, [], sampler=sampler, microbatch_size=config.microbatch_size).images
        )
        del policy  # or it would be in memory beside the next one
        gc.collect()
    return from_images(prompts, images[0], images[1], sources=(first, second))


if __name__ == "__main__":
    run_command(main, config)
