"""Best-of-N: paint several images of each prompt and keep the one the judge likes best.

    accelerate launch recipes/best_of_n.py                            the built-in world, a minute on a laptop
    accelerate launch recipes/best_of_n.py --prune_after 2,4          give the worse half up after 2 and after 4 steps

No weight is changed. The report draws what every n up to N is worth, all from this one run. With pruning, each image
is judged while it is still noise, by the clean image that the model sees in it, and only promising ones are finished;
the same seeds are then also painted to the end, to see what that saved and what it lost (`--compare false` does not).

Finished images are on the disk at once; after any stop `--resume` goes on with the others. `images/` has the layout
that GenEval's scorer reads.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.best_of_n import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)


from rlhf_t2i.report.search import write_report
from rlhf_t2i.search.candidates import best_of_n, check_pruning, halving, pruned_best_of_n
from rlhf_t2i.search.records import SearchRecord
from rlhf_t2i.search.run import finite_or_none, start_search


def main(config: Config) -> list[SearchRecord]:
    """Generate N images of each prompt, score them, keep the best."""
    keep = halving(config.num_candidates, after=config.pruning_steps)
    check_pruning(keep, num=config.num_candidates, num_steps=config.num_denoising_steps)
    search = start_search(config, recipe="best_of_n", eta=config.eta)
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
    main(config)
