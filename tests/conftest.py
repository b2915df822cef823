"""Tiny random pipelines as fixtures, and a clean state for every test."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import shape_checks

shape_checks.install()  # before any module of the project is imported

from tests import loaded_once, processes, tiny  # noqa: E402
from tests.publications import hub, lora_run, publication, reward_model_run, unet_run  # noqa: E402, F401  # fixtures

# One thread for torch here and in child processes: workers with a thread for each core would wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Parsing a module for the shape checks must not be interrupted by the garbage collector: on Python 3.11 that can fail
# with "AST constructor recursion depth mismatch" (python/cpython#106905). So it runs between tests only.
gc.disable()
_MANY_OBJECTS = 200_000
_IN_ONE_WORKER = {
    f"tests/test_{name}.py"
    for name in (
        "built_in_reward_model", "oracle", "pairs", "parallel", "publish_usage", "reward_progress", "report_images",
    )
}  # fmt: skip


_LONGEST = {
    f"test_{name}.py"
    for name in ("watch", "reward_training", "plan_of_configs", "flow_grpo", "diffusion_nft", "dry_run")
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with what takes or waits longest, so that at the end no worker is left alone with it."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, item.path.name not in _LONGEST))


def pytest_collection_finish() -> None:
    loaded_once.install()
    gc.freeze()  # what was imported so far need not be looked through again and again


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        processes.reserve_server()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run one or two files in this process: workers would take longer to start than the tests.

    Otherwise start one worker more than there are cores, because many tests wait for processes that they started.
    """
    files = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(files) < 3 and all(file.endswith(".py") for file in files) else (os.cpu_count() or 1) + 1


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give all tests of a file whose fixtures are expensive to one worker, so that nothing is trained twice."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in _IN_ONE_WORKER else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Use one thread, since the last bit of a sum depends on their number; reset accelerate after each test."""
    yield
    sys.modules.pop("my_rewards", None)  # the file of rewards of the pages, which each test writes anew
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()
    if gc.get_count()[0] > _MANY_OBJECTS:
        gc.collect()


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
def tiny_flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_flux2(tmp_path_factory.mktemp("models") / "flux2")


@pytest.fixture(scope="session")
def tiny_sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sana(tmp_path_factory.mktemp("models") / "sana")


@pytest.fixture(scope="session")
def tiny_qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_qwen_image(tmp_path_factory.mktemp("models") / "qwen_image")


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_flux(tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_flux(tmp_path_factory.mktemp("models") / "schnell", is_distilled=False)
