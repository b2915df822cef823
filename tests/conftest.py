"""Tiny random pipelines as fixtures, and a clean state for every test."""

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
    """Reset accelerate after each test, so that each can set up its own Accelerator."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def steady_threads() -> Iterator[None]:
    """Use one thread: the order of sums, and so the last bit, depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like SD 1.5: noise prediction, saved with a PNDM scheduler."""
    return tiny.save_sd(tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like SD 2.1: v-prediction, saved with a DDIM scheduler."""
    folder = tmp_path_factory.mktemp("models") / "sd21"
    return tiny.save_sd(folder, prediction_type="v_prediction", scheduler="DDIMScheduler")


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
