"""`--dry_run` of configs at full size: options fit the model, and it fits the GPU.

All configs take ten minutes of a core: `python benchmarks/what_fits.py` plans them, and these are the quickest of
several families.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.what_fits import CONFIGS, planned
from rlhf_t2i.models.architectures import published_architecture
from rlhf_t2i.plan.rewards import bytes_of_rewards, is_offloaded
from rlhf_t2i.plan.text import GPUS, SPARE, usable_bytes

QUICK = ("ddpo_sd15", "diffusion_dpo_sd15", "fk_sd15", "flow_grpo_flux2_klein_24gb", "flow_grpo_zimage_24gb")
PLANNED = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.startswith("reward_")]
BILLIONS = {
    "stable-diffusion-v1-5": {"unet": 0.86, "text_encoder": 0.123},
    "stable-diffusion-xl-base-1.0": {"unet": 2.567, "text_encoder_2": 0.695},
    "stable-diffusion-3.5-medium": {"transformer": 2.24, "text_encoder_3": 4.762},
    "stable-diffusion-3.5-large": {"transformer": 8.06},
    "FLUX.1-dev": {"transformer": 11.9, "text_encoder_2": 4.762},
    "Z-Image-Turbo": {"transformer": 6.15, "text_encoder": 4.022},
    "FLUX.2-klein-base-4B": {"transformer": 3.88, "text_encoder": 4.022},
    "Qwen-Image-2512": {"transformer": 20.43, "text_encoder": 8.292},
}
"""Published parameters of the parts of models, in billions."""


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_config_can_be_planned_at_full_size(name: str) -> None:
    config, plan = planned(CONFIGS / f"{name}.yaml")
    for part, published in BILLIONS.get(config.model.split("/")[-1], {}).items():
        learned, frozen, _ = plan.parts[part]
        lora = learned if getattr(config, "trains_lora", False) else 0
        assert (learned + frozen - lora) / 1e9 == pytest.approx(published, rel=0.01)
    assert plan.images > 0
    assert plan.flops > 0
    if name.endswith("_24gb"):
        assert plan.peak <= usable_bytes(24)


def test_a_gpu_has_as_many_bytes_as_its_driver_says() -> None:
    """Of all memory that nvidia-smi shows, in MiB, nine tenths are usable."""
    shown = {"RTX 4090": 24_564, "A100": 81_920, "H100": 81_559, "H200": 143_771}
    for gpu in GPUS:
        assert usable_bytes(gpu.memory) == pytest.approx(SPARE * shown[gpu.name] * 2**20, rel=0.006)


def test_every_model_of_a_config_that_is_no_toy_has_a_published_architecture() -> None:
    models = {line.split()[1] for path in PLANNED for line in path.read_text().splitlines() if line[:6] == "model:"}
    assert {model for model in models if published_architecture(model) is None} == {"words-flow"}
    assert {model.split("/")[-1] for model in models} - {"words-flow"} <= BILLIONS.keys()


def test_weights_of_rewards_count_by_their_published_size(tmp_path: Path) -> None:
    (tmp_path / "llava_reward.json").write_text('{"backbone": "Qwen/Qwen2.5-VL-3B-Instruct"}')
    known = ["clip:yuvalkirstain/PickScore_v1", f"llava_reward:{tmp_path}", "http://127.0.0.1:8000", "oracle"]
    size, unknown = bytes_of_rewards([*known, *known, "clip:somebody/else", "llava_reward:missing"])
    assert size == pytest.approx(4 * 0.986e9 + 2 * 3.755e9, rel=1e-3)
    assert unknown == ["clip:somebody/else", "llava_reward:missing"]


def test_arguments_of_a_reward_say_its_precision_and_when_it_is_on_the_device() -> None:
    name, parameters = "clip:yuvalkirstain/PickScore_v1", 986_109_441
    assert bytes_of_rewards([f"{name}(offload=True)"]) == (4 * parameters, [])
    assert bytes_of_rewards([f"{name}(dtype='bfloat16', batch_size=4)"]) == (2 * parameters, [])
    assert [is_offloaded(f"{name}{arguments}") for arguments in ("", "(offload=True)", "(batch_size=4)")] == [
        False, True, False,
    ]  # fmt: skip
    assert not is_offloaded("my_rewards:brightness('linear')")
