"""Best-of-N: sample N images of each prompt and return the one with the highest reward.

    accelerate launch recipes/best_of_n.py
    accelerate launch recipes/best_of_n.py --prune_after 2,4

The first command searches with the built-in model on a CPU in a minute. The weights of the model stay as they are. The
report shows the expected reward of every n up to N, estimated from the same N images.

With --prune_after (successive halving) the predicted clean image of every candidate is scored after so many denoising
steps, and only the better half continues. The same seeds are also sampled to the end, so that the report compares cost
and reward of both; --baseline false leaves that out.

Finished images are written at once, and --resume continues an interrupted search. `images/` has the layout that
GenEval's evaluation reads.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.settings.best_of_n import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)


from rlhf_t2i.plan import or_plan
from rlhf_t2i.report.search import write_report
from rlhf_t2i.search.candidates import best_of_n, check_pruning, halving, pruned_best_of_n
from rlhf_t2i.search.records import SearchRecord
from rlhf_t2i.search.run import finite_or_none, start_search


def main(config: Config) -> list[SearchRecord]:
    """Generate N images of each prompt, score them, keep the best."""
    keep = halving(config.num_candidates, after=config.pruning_steps)
    check_pruning(keep, num=config.num_candidates, num_steps=config.num_denoising_steps)
    search = start_search(config, recipe="best_of_n", eta=config.eta, standardise=config.standardise_rewards)
    for tasks in search.batches():
        prompts, seeds = (
            [task.text for task in tasks],
            [task.seeds(config.seed, config.num_candidates) for task in tasks],
        )
        baseline = None
        if config.baseline or not keep:
            baseline = best_of_n(search.context, prompts, generators=search.generators(tasks, config.num_candidates))
        if baseline and not keep:
            search.write_results(tasks, baseline, baseline=baseline, seeds=seeds)
            continue
        pruned = pruned_best_of_n(
            search.context, prompts, keep=keep, generators=search.generators(tasks, config.num_candidates)
        )
        survivor_seeds = [[seeds[i][int(j)] for j in survivors] for i, survivors in enumerate(pruned.survivors)]
        early_rewards = [
            {str(after): finite_or_none(scores.reward[i]) for after, scores in pruned.rounds.items()}
            for i in range(len(tasks))
        ]
        search.write_results(
            tasks, pruned.candidates, baseline=baseline, seeds=survivor_seeds, early_rewards=early_rewards
        )
    return search.close(report=write_report)


if __name__ == "__main__":
    run_command(or_plan(main), config)
