"""Updates whose gradient is not finite, and the attention backend, which may be their cause."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.backends import cuda

from rlhf_t2i.distributed.replicated import Replicated
from rlhf_t2i.settings.groups import AttentionSettings
from rlhf_t2i.training.environment import prepare_torch
from rlhf_t2i.training.updates import Updates


class Steps:
    """Two layers of one process; `take(bad=...)` takes an optimiser step with NaN in the named gradient."""

    def __init__(self, *, max_skipped: int = 2, has_scaler: bool = False) -> None:
        self.network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        engine = Replicated(
            Accelerator(cpu=True), self.network, torch.optim.SGD(self.network.parameters()), max_gradient_norm=1.0
        )
        self.printed: list[str] = []
        self.updates = Updates(
            engine, max_skipped=max_skipped, has_scaler=has_scaler, gather=lambda x: x, print=self.printed.append
        )

    def take(self, *, bad: str | None = None) -> float:
        for name, parameter in self.network.named_parameters():
            parameter.grad = torch.full_like(parameter, torch.nan if name == bad else 1.0)
        return self.updates.take(0.1, step=4)["skipped_updates"]


def test_a_first_update_that_is_not_finite_names_the_layers_and_the_remedy() -> None:
    with pytest.raises(
        RuntimeError, match=r"first update is not finite in 1 of 3 trained weights \(1.weight\).*--attention math"
    ):
        Steps().take(bad="1.weight")


@pytest.mark.parametrize("has_scaler", [False, True])
def test_a_later_update_that_is_not_finite_is_skipped_and_stops_the_run_when_too_many_follow(has_scaler: bool) -> None:
    """With a loss scaler also the first, whose scale may still be too large."""
    steps = Steps(has_scaler=has_scaler)
    before = [steps.take(bad="0.bias" if has_scaler else None), steps.take()]
    assert before == [float(has_scaler), 0.0]
    weights = [parameter.clone() for parameter in steps.network.parameters()]
    assert steps.take(bad="0.bias") == 1
    assert all(map(torch.equal, weights, steps.network.parameters()))
    with pytest.raises(RuntimeError, match="The last 2 updates, up to step 5"):
        steps.take(bad="0.bias")
    assert len(steps.printed) == 2 + has_scaler


@pytest.fixture
def own_backends() -> Iterator[None]:
    yield
    prepare_torch(attention="auto", num_cpu_threads=1)


@pytest.mark.usefixtures("own_backends")
@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        (AttentionSettings().attention, "flash efficient math"),
        ("flash", "flash math"),
        ("efficient", "efficient math"),
        ("math", "math"),
        ("cudnn", "math cudnn"),
    ],
)
def test_cudnn_attention_is_used_only_on_request(attention: str, expected: str) -> None:
    prepare_torch(attention=attention, num_cpu_threads=1)
    enabled = {
        "flash": cuda.flash_sdp_enabled(), "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(), "cudnn": cuda.cudnn_sdp_enabled(),
    }  # fmt: skip
    assert [name for name, on in enabled.items() if on] == expected.split()
