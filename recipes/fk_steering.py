"""FK steering: resample particles by their reward while they are sampled (Singhal et al., arXiv:2501.06848).

    accelerate launch recipes/fk_steering.py
    accelerate launch recipes/fk_steering.py --config recipes/configs/fk_sd15.yaml --rewards llava_reward:PATH

The first command searches with the built-in model on a CPU in two minutes, the second with Stable Diffusion 1.5. The
weights of the model stay as they are.

Each search samples num_particles images together. After each denoising step of resample_after:

    score       the predicted clean image of each particle
    weight      log_weight += lambda * (reward - last reward), or the highest reward or the sum of rewards so far
    resample    particles in proportion to their weights; each continues with its own noise

Images then follow p(image) * exp(lambda * reward), where lambda = strength / reward_std. The best one is returned.
Best-of-N with as many images from the same seeds, which needs as many denoiser calls, is run beside it for the report;
--baseline false leaves that out.

Finished images are written at once, and --resume continues an interrupted search. `images/` has the layout that
GenEval's evaluation reads.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.settings.fk_steering import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

import math

from rlhf_t2i.plan import or_plan
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
            initial_max=-math.inf if config.initial_max is None else config.initial_max,
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
    run_command(or_plan(main), config)
