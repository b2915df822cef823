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

import json
from dataclasses import dataclass

from rlhf_t2i.config import Rule, names, parse_config
from rlhf_t2i.files import write_atomically
from rlhf_t2i.report.search import Found
from rlhf_t2i.search.best_of_n import best_of_n
from rlhf_t2i.search.fk_steering import check_steering, fk_steering, reward_spread
from rlhf_t2i.search.particles import PotentialName
from rlhf_t2i.search.run import Search, SearchConfig, start_search

NUM_CALIBRATION_PROMPTS, NUM_CALIBRATION_IMAGES = 16, 4


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


def main(config: Config) -> list[Found]:
    """Paint crowds, steer them, keep the best."""
    search = start_search(config, recipe="fk_steering", eta=config.eta)
    check_steering(search.context, config.resampling_steps, spread=1.0, ess_threshold=config.ess_threshold)
    spread = config.spread or measured_spread(search)
    for tasks in search.batches():
        prompts, seeds = (
            [task.text for task in tasks],
            [task.seeds(config.seed, config.num_particles) for task in tasks],
        )
        plain = None
        if config.compare:
            plain = best_of_n(search.context, prompts, generators=search.generators(tasks, config.num_particles))
        steered = fk_steering(
            search.context, prompts, strength=config.strength, spread=spread, potential=config.potential,
            resample_after=config.resampling_steps, ess_threshold=config.ess_threshold,
            generators=search.generators(tasks, config.num_particles), resampling=search.resampling(tasks),
        )  # fmt: skip
        effective = [{str(k): round(v[i].item(), 4) for k, v in steered.effective.items()} for i in range(len(tasks))]
        weights = steered.log_weights.softmax(dim=1).tolist()
        search.finish(tasks, steered.candidates, plain=plain, seeds=seeds, effective=effective, weights=weights)
    return search.close()


def measured_spread(search: Search) -> float:
    """The reward's spread on plain images; measured once in a run, whose later sessions read it."""
    path = search.run.folder / "spread.json"
    if search.run.is_main and not path.is_file():
        prompts = search.prompts[:NUM_CALIBRATION_PROMPTS]
        spread = reward_spread(search.context, prompts, generators=search.pilots(len(prompts) * NUM_CALIBRATION_IMAGES))
        write_atomically(path, json.dumps({"spread": spread, "images": len(prompts) * NUM_CALIBRATION_IMAGES}))
        search.run.say(f"The reward's standard deviation among images of one prompt is {spread:.3g}.")
    search.run.accelerator.wait_for_everyone()
    return json.loads(path.read_text())["spread"]


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__ or ""))
