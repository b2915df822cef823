"""Moving averages of weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.training.ema import MovingAverage, decay_after_a_start, rising_decay


def weights_at(step: int) -> dict[str, Tensor]:
    """Random weights, others at each step."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(shape, generator=generator, requires_grad=True)
        for name, shape in (("matrix", (3, 4)), ("bias", (4,)))
    }


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.99])
def test_the_average_agrees_with_a_loop(decay: float) -> None:
    """The decay of update n is at most (1 + n) / (10 + n): 2/11, 3/12, 4/13, ..."""
    weights = weights_at(0)
    average = MovingAverage(weights, decay=decay_after_a_start(decay))
    expected = {name: weight.tolist() for name, weight in weights.items()}
    expected["matrix"] = [number for row in expected["matrix"] for number in row]
    for n in range(1, 30):
        weights = weights_at(n)
        average.update(weights)
        used = min(decay, (1 + n) / (10 + n))
        for name, numbers in expected.items():
            own = weights[name].flatten().tolist()
            expected[name] = [used * old + (1 - used) * new for old, new in zip(numbers, own, strict=True)]
    for name, numbers in expected.items():
        assert_close(average.average[name].flatten(), torch.tensor(numbers), rtol=1e-5, atol=1e-6)


def test_constant_weights_are_their_own_average() -> None:
    weights = weights_at(0)
    average = MovingAverage(weights, decay=decay_after_a_start(0.9))
    for _ in range(20):
        average.update(weights)
    assert_close(average.average["bias"], weights["bias"].detach())


def test_applied_sets_the_averages_and_restores_equal_bits() -> None:
    weights = weights_at(0)
    average = MovingAverage(weights, decay=decay_after_a_start(0.9))
    with torch.no_grad():
        weights["bias"].add_(1.7)
        weights["matrix"].mul_(1 / 3)
    average.update(weights)
    own = {name: weight.detach().clone() for name, weight in weights.items()}

    with average.applied(weights):
        for name, weight in weights.items():
            assert torch.equal(weight, average.average[name])
            assert not torch.equal(weight, own[name])

    for name, weight in weights.items():
        assert torch.equal(weight, own[name])
        assert weight.requires_grad


def test_applied_restores_the_weights_after_an_error() -> None:
    weights = weights_at(0)
    average = MovingAverage(weights_at(1), decay=decay_after_a_start(0.9))
    with pytest.raises(RuntimeError, match="evaluation"), average.applied(weights):
        raise RuntimeError("evaluation failed")
    assert torch.equal(weights["bias"], weights_at(0)["bias"])


def test_a_decay_of_zero_is_off() -> None:
    weights = weights_at(0)
    average = MovingAverage(weights, decay=decay_after_a_start(0.0))
    average.update(weights_at(1))
    with average.applied(weights):
        assert torch.equal(weights["bias"], weights_at(0)["bias"])
    assert torch.equal(weights["bias"], weights_at(0)["bias"])


def test_the_average_is_not_the_weights_themselves() -> None:
    weights = weights_at(0)
    average = MovingAverage(weights, decay=decay_after_a_start(0.9))
    with torch.no_grad():
        weights["bias"].zero_()
    assert torch.equal(average.average["bias"], weights_at(0)["bias"])
    assert not average.average["bias"].requires_grad


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_restored_average_continues_equally(decay: float) -> None:
    average = MovingAverage(weights_at(0), decay=decay_after_a_start(decay))
    for step in range(1, 4):
        average.update(weights_at(step))
    restored = MovingAverage(weights_at(9), decay=decay_after_a_start(decay))
    restored.average.update({name: value.clone() for name, value in average.average.items()})
    restored.load_state_dict(average.state_dict())
    for step in range(4, 7):
        average.update(weights_at(step))
        restored.update(weights_at(step))
    assert restored.num_updates == average.num_updates == 6
    assert restored.average.keys() == average.average.keys()
    for name, value in average.average.items():
        assert torch.equal(restored.average[name], value)


def test_a_rising_decay_by_hand() -> None:
    """Until `start` the average equals the weights."""
    decay = rising_decay(start=2, rise=0.2, most=0.5)
    assert [decay(n) for n in range(1, 7)] == pytest.approx([0, 0, 0.2, 0.4, 0.5, 0.5])
    average = MovingAverage(weights_at(0), decay=decay)
    for step in (1, 2):
        average.update(weights_at(step))
        assert torch.equal(average.average["bias"], weights_at(step)["bias"])
    average.update(weights_at(3))
    expected = 0.2 * weights_at(2)["bias"] + 0.8 * weights_at(3)["bias"]
    assert_close(average.average["bias"], expected.detach())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_an_impossible_decay_is_refused_with_its_value(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"{decay}.*\[0, 1\)"):
        MovingAverage(weights_at(0), decay=decay_after_a_start(decay))
