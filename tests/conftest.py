"""Tiny random pipelines in their ordinary format, and recipes run inside the test process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.publications import hub, lora_run, publication, reward_model_run, unet_run  # noqa: F401  # fixtures

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Parsing a module for the shape checks must not be interrupted by the garbage collector: on Python 3.11 that can fail
# with "AST constructor recursion depth mismatch" (python/cpython#106905). So all of them are imported here, at once.
gc.disable()
import rlhf_t2i.models.flux  # noqa: E402
import rlhf_t2i.models.load  # noqa: E402
import rlhf_t2i.models.sd3  # noqa: E402
import rlhf_t2i.models.sdxl  # noqa: E402
import rlhf_t2i.models.stable_diffusion  # noqa: E402
import rlhf_t2i.models.zimage  # noqa: E402
import rlhf_t2i.rewards.builtin  # noqa: E402
import rlhf_t2i.shapes.build_flow  # noqa: E402, F401

gc.enable()


@pytest.fixture(autouse=True)
def fresh_processes() -> Iterator[None]:
    """Let every test set up its own Accelerator."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def steady_threads() -> Iterator[None]:
    """Sums in one order: the number of threads changes the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_tiny_pipeline(folder: Path, *, prediction_type: str = "epsilon", scheduler: str = "PNDMScheduler") -> Path:
    """A random Stable Diffusion of 16 x 16 pixels in the format of SD 1.5: AutoencoderKL, CLIP, U-Net."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    from rlhf_t2i.shapes.networks import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    noise_schedule = getattr(diffusers, scheduler)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
        **({"clip_sample": False} if scheduler == "DDIMScheduler" else {"skip_prk_steps": True}),
    )
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise_schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like SD 1.5: noise prediction, saved with a PNDM scheduler."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like SD 2.1: v-prediction, saved with a DDIM scheduler."""
    folder = tmp_path_factory.mktemp("models") / "sd21"
    return save_tiny_pipeline(folder, prediction_type="v_prediction", scheduler="DDIMScheduler")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def tiny_sdxl_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sdxl(tmp_path_factory.mktemp("models") / "sdxl_v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="session")
def tiny_sd3_lean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without T5, and with a schedule that depends on the size of the image."""
    return tiny.save_sd3(tmp_path_factory.mktemp("models") / "sd3_lean", with_t5=False, dynamic_shift=True)


@pytest.fixture(scope="session")
def tiny_zimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_zimage(tmp_path_factory.mktemp("models") / "zimage")


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_flux(tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_flux(tmp_path_factory.mktemp("models") / "schnell", is_distilled=False)
