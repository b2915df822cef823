"""FK steering: images that promise well multiply while they are painted (Singhal et al., arXiv:2501.06848).

    accelerate launch recipes/fk_steering.py          the built-in world, two minutes on a laptop
    accelerate launch recipes/fk_steering.py --config recipes/configs/fk_sd15.yaml --rewards llava_reward:PATH --prompts FILE

No weight is changed. Each prompt has a crowd of particles. After some of the denoising steps

    look       the clean image that the model sees in each particle is judged
    weigh      log-weight += lambda * (reward - last reward)        or with the highest, or the sum, of rewards so far
    resample   heavy particles take the places of light ones, then each goes on with noise of its own

so that the images follow p(image) * exp(lambda * reward), lambda = strength / the reward's own spread. The best one
is kept. Plain best-of-N of as many images from the same seeds is painted beside it, which costs as many denoiser
calls (`--compare false` does not).

Finished images are on the disk at once; after any stop `--resume` goes on with the others. `images/` has the layout
that GenEval's scorer reads.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.fk_steering import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)


from rlhf_t2i.report.search import write_report
from rlhf_t2i.search.candidates import best_of_n
from rlhf_t2i.search.records import SearchRecord
from rlhf_t2i.search.run import start_search
from rlhf_t2i.search.steering import check_steering, fk_steering


def main(config: Config) -> list[SearchRecord]:
    """Sample and resample particles of each prompt, keep the best."""
    search = start_search(config, recipe="fk_steering", eta=config.eta)
    check_steering(search.context, config.resampling_steps, reward_std=1.0, ess_threshold=config.ess_threshold)
    reward_std = config.reward_std or search.measured_reward_std()
    for tasks in search.batches():
        prompts = [task.text for task in tasks]
        seeds = [task.seeds(config.seed, config.num_particles) for task in tasks]
        baseline = None
        if config.baseline:
            baseline = best_of_n(search.context, prompts, generators=search.generators(tasks, config.num_particles))
        steered = fk_steering(
            search.context, prompts, strength=config.strength, reward_std=reward_std, potential=config.potential,
            resample_after=config.resampling_steps, ess_threshold=config.ess_threshold,
            generators=search.generators(tasks, config.num_particles), resampling=search.resampling_generators(tasks),
        )  # fmt: skip
        sample_sizes = [
            {str(after): round(sizes[i].item(), 4) for after, sizes in steered.effective_sample_size.items()}
            for i in range(len(tasks))
        ]
        search.write_results(
            tasks, steered.candidates, baseline=baseline, seeds=seeds, effective_sample_size=sample_sizes,
            weights=steered.log_weights.softmax(dim=1).tolist(),
        )  # fmt: skip
    return search.close(report=write_report)


if __name__ == "__main__":
    main(config)
