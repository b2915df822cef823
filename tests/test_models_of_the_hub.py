"""Models and LoRAs of the Hub, from a fake one on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
from torch.testing import assert_close

from rlhf_t2i.models.load import load_policy
from tests.hub import Commit, FakeHub, Repository
from tests.policies import images_of, policy_of
from tests.publications import file_contents
from tests.toys import CPU
from tests.trained_weights import lora_of

pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")  # of diffusers


@pytest.fixture(autouse=True)
def downloads(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)  # of the functions that diffusers imports


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_model_is_loaded_from_the_files_that_its_repository_has(
    variant: str, hub: FakeHub, tiny_sd: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_name(f"{file.stem}{variant}.safetensors"))
    hub.repos["some/model"] = Repository(branches={"main": [Commit(file_contents(folder))]})
    policy = load_policy("some/model", device=CPU, resolution=16)
    assert_close(images_of(policy), images_of(policy_of(tiny_sd)), rtol=0, atol=0)


def test_a_lora_of_the_hub_is_named_by_its_repository_or_file(hub: FakeHub, tiny_sd: Path, tmp_path: Path) -> None:
    file = lora_of(tiny_sd, tmp_path)
    files = {file.name: file.read_bytes(), "other.safetensors": file.read_bytes()}
    hub.repos["some/lora"] = Repository(branches={"main": [Commit(files)]})
    expected = images_of(policy_of(tiny_sd, weights=file))
    for name in ("some/lora", "some/lora/other.safetensors"):
        assert_close(images_of(policy_of(tiny_sd, weights=Path(name))), expected, rtol=0, atol=0)
    with pytest.raises(
        FileNotFoundError, match=r"the LoRA could not be loaded from the Hub .* is OWNER/NAME/FILE"
    ) as e:
        policy_of(tiny_sd, weights=Path("some/lora/nothing.safetensors"))
    assert "\n" not in str(e.value)
