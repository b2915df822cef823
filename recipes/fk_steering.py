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

from dataclasses import dataclass

from rlhf_t2i.config import Rule, names, parse_config
from rlhf_t2i.report.search import SearchRecord
from rlhf_t2i.search.candidates import best_of_n
from rlhf_t2i.search.particles import PotentialName
from rlhf_t2i.search.run import SearchConfig, start_search
from rlhf_t2i.search.steering import check_steering, fk_steering


@dataclass(frozen=True, kw_only=True)
class Config(SearchConfig):
    """Those of every search, and FK steering's own."""

    num_particles: int = 16
    """Images of each prompt that are painted together."""
    eta: float = 1.0
    """Noise of each step, in (0, 1]: 1 is as much as the forward process has."""
    strength: float = 2.0
    """How much reward counts against being likely; 0 is plain sampling."""
    spread: float | None = None
    """The reward's standard deviation among images of one prompt, the unit of strength; null measures it on a few
    plain images. With 1, strength is the published lambda."""
    potential: PotentialName = "difference"
    resample_after: str = "2,3,4,6"
    """Comma-separated numbers of denoising steps after which particles are judged and may be resampled."""
    ess_threshold: float = 1.0
    """Resample only where the effective number of particles is below this share of them; 1 always does."""
    compare: bool = True
    """Also paint plain best-of-N of as many images, for the report."""

    def rules(self) -> list[Rule]:
        return [
            *super().rules(),
            ("num_particles", self.num_particles >= 1, "at least 1"),
            ("eta", 0 < self.eta <= 1, "in (0, 1]: FK steering needs steps with noise, or copies stay copies"),
            ("strength", self.strength >= 0, "at least 0"),
            ("spread", self.spread is None or self.spread > 0, "positive"),
            (
                "resample_after",
                bool(names(self.resample_after))
                and all(p.isdigit() and 1 <= int(p) < self.num_denoising_steps for p in names(self.resample_after)),
                f"whole numbers with commas, from 1 to {self.num_denoising_steps - 1}",
            ),
            ("ess_threshold", 0 < self.ess_threshold <= 1, "in (0, 1]"),
        ]

    @property
    def resampling_steps(self) -> list[int]:
        return sorted(int(part) for part in names(self.resample_after))


def main(config: Config) -> list[SearchRecord]:
    """Sample and resample particles of each prompt, keep the best."""
    search = start_search(config, recipe="fk_steering", eta=config.eta)
    check_steering(search.context, config.resampling_steps, reward_std=1.0, ess_threshold=config.ess_threshold)
    reward_std = config.spread or search.measured_reward_std()
    for tasks in search.batches():
        prompts = [task.text for task in tasks]
        seeds = [task.seeds(config.seed, config.num_particles) for task in tasks]
        baseline = None
        if config.compare:
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
    return search.close()


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__ or ""))
