"""SkipCA compared with cross-attention in float64 with explicit keys and values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from reward_model.skip_ca import SkipCrossAttention

WIDTH = 8


def slow_skip_ca(
    parameters: dict[str, Tensor], hidden: Tensor, visual: Tensor, mask: Tensor, *, num_heads: int
) -> Tensor:
    """Compute SkipCA row by row and head by head, in the dtype of the arguments."""
    rows, size = [], hidden.shape[1] // num_heads
    for i in range(len(hidden)):
        tokens = visual[i][mask[i]]
        query = parameters["query.weight"] @ hidden[i]
        keys = torch.stack([parameters["key.weight"] @ token for token in tokens])
        values = torch.stack([parameters["value.weight"] @ token for token in tokens])
        heads = []
        for j in range(num_heads):
            part = slice(j * size, (j + 1) * size)
            attention = torch.softmax(keys[:, part] @ query[part] / math.sqrt(size), dim=0)
            heads.append(attention @ values[:, part])
        total = hidden[i] + torch.cat(heads)
        rows.append(parameters["norm.weight"] * total / torch.sqrt((total**2).mean() + 1e-5))
    return torch.stack(rows)


def wide(num_heads: int = 1) -> SkipCrossAttention:
    """Return a module with weights large enough for attention to be far from uniform."""
    skip_ca, generator = SkipCrossAttention(WIDTH, num_heads=num_heads), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in skip_ca.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return skip_ca


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Three rows with 5, 1 and 3 visual tokens; masked tokens are large, so that they would have an effect."""
    generator = torch.Generator().manual_seed(4)
    hidden, visual = torch.randn(3, WIDTH, generator=generator), torch.randn(3, 5, WIDTH, generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    return hidden, visual.masked_fill(~mask[:, :, None], 50.0), mask


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_values_and_gradients_equal_explicit_attention_in_float64(num_heads: int) -> None:
    skip_ca, (hidden, visual, mask) = wide(num_heads), inputs()
    hidden.requires_grad_(), visual.requires_grad_()
    exact = {name: p.detach().double().requires_grad_() for name, p in skip_ca.named_parameters()}
    exact_hidden, exact_visual = (x.detach().double().requires_grad_() for x in (hidden, visual))
    weights = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))

    out = skip_ca(hidden, visual, mask)
    expected = slow_skip_ca(exact, exact_hidden, exact_visual, mask, num_heads=num_heads)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()

    assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(hidden.grad, exact_hidden.grad, check_dtype=False, rtol=1e-4, atol=1e-5)
    assert_close(visual.grad, exact_visual.grad, check_dtype=False, rtol=1e-4, atol=1e-5)
    for name, parameter in skip_ca.named_parameters():
        assert_close(parameter.grad, exact[name].grad, check_dtype=False, rtol=1e-4, atol=1e-5, msg=name)


def test_attention_by_hand() -> None:
    """q = h, and keys as wide as sqrt(D) ln 3 make weights 3/4 and 1/4; values double."""
    skip_ca = SkipCrossAttention(2)
    with torch.no_grad():
        skip_ca.query.weight.copy_(torch.eye(2))
        skip_ca.key.weight.copy_(math.sqrt(2) * math.log(3) * torch.eye(2))
        skip_ca.value.weight.copy_(2 * torch.eye(2))
    hidden, visual = torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    total = torch.tensor([[1 + 2 * 3 / 4, 2 * 1 / 4]])  # h + 2 (3/4, 1/4)
    norm = math.sqrt((2.5**2 + 0.5**2) / 2 + 1e-5)
    assert_close(skip_ca(hidden, visual, torch.ones(1, 2, dtype=torch.bool)), total / norm)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_attention_weights_equal_explicit_attention(num_heads: int) -> None:
    skip_ca, (hidden, visual, mask) = wide(num_heads), inputs()
    weights = skip_ca.attention_weights(hidden, visual, mask)
    queries = (hidden.double() @ skip_ca.query.weight.double().T).unflatten(-1, (num_heads, -1))
    keys = (visual.double() @ skip_ca.key.weight.double().T).unflatten(-1, (num_heads, -1))
    for i, count in enumerate(mask.sum(dim=1).tolist()):
        logits = torch.einsum("hd,vhd->hv", queries[i], keys[i, :count]) / math.sqrt(WIDTH // num_heads)
        assert_close(weights[i, :, :count].double(), logits.softmax(dim=-1), rtol=1e-5, atol=1e-6)
        assert torch.all(weights[i, :, count:] == 0)
    assert_close(weights.sum(dim=-1), torch.ones(3, num_heads))


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_made_from_the_attention_weights_to_the_bit(num_heads: int, dtype: torch.dtype) -> None:
    """So that a map of the weights shows what the score was made from."""
    skip_ca, (hidden, visual, mask) = wide(num_heads), inputs()
    hidden, visual = hidden.to(dtype), visual.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = skip_ca(hidden, visual, mask), skip_ca.attention_weights(hidden, visual, mask)
    assert weights.dtype == torch.float32
    pooled = torch.einsum("bhv,bvw->bhw", weights, visual.float())
    value = skip_ca.value.weight.unflatten(0, (num_heads, -1))
    total = hidden.float() + torch.einsum("bhw,hdw->bhd", pooled, value).flatten(1)
    assert torch.equal(out, torch.nn.functional.rms_norm(total, (WIDTH,), skip_ca.norm.weight, 1e-5))


def test_several_heads_differ_from_one() -> None:
    """A guard for the tests above: with uniform attention they would not depend on the number of heads."""
    one, four = wide(1), wide(4)
    assert (one(*inputs()) - four(*inputs())).abs().max() > 0.1


@pytest.mark.parametrize("num_heads", [1, 4])
def test_masked_tokens_have_no_influence_and_get_no_gradient(num_heads: int) -> None:
    skip_ca, (hidden, visual, mask) = wide(num_heads), inputs()
    other = torch.where(mask[:, :, None], visual, -7.0).requires_grad_()
    out = skip_ca(hidden, other, mask)
    assert torch.equal(out, skip_ca(hidden, visual, mask))
    out.sum().backward()
    assert torch.all(other.grad[~mask] == 0)
    assert torch.all(other.grad[0] != 0)


def test_longer_padding_changes_nothing() -> None:
    skip_ca, (hidden, visual, mask) = wide(), inputs()
    longer = torch.cat([visual, torch.full((3, 4, WIDTH), 9.0)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], dim=1)
    assert_close(skip_ca(hidden, longer, longer_mask), skip_ca(hidden, visual, mask), rtol=0, atol=1e-6)


def test_at_initialisation_the_output_is_almost_the_norm_of_the_last_token() -> None:
    """As published: N(0, 1 / (D + 1)^2) weights scale the attended values to a few per cent of the visual tokens."""
    torch.manual_seed(0)
    width, generator = 256, torch.Generator().manual_seed(1)
    skip_ca = SkipCrossAttention(width)
    hidden, visual = torch.randn(4, width, generator=generator), torch.randn(4, 9, width, generator=generator)
    gap = skip_ca(hidden, visual, torch.ones(4, 9, dtype=torch.bool)) - torch.rms_norm(hidden, (width,), eps=1e-5)
    assert 0 < gap.abs().max() < 0.1
    for layer in (skip_ca.query, skip_ca.key, skip_ca.value):
        assert layer.weight.std().item() == pytest.approx(1 / (width + 1), rel=0.02)
    assert torch.all(skip_ca.norm.weight == 1)


def test_bfloat16_inputs_are_computed_in_float32_even_under_autocast() -> None:
    """The result is that of the rounded inputs in float32, to the bit."""
    skip_ca, (hidden, visual, mask) = wide(), inputs()
    hidden, visual = hidden.bfloat16(), visual.bfloat16()
    expected = skip_ca(hidden.float(), visual.float(), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = skip_ca(hidden, visual, mask)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    assert torch.equal(skip_ca(hidden, visual, mask), expected)


@pytest.mark.parametrize("num_heads", [3, 5, 16])
def test_heads_that_do_not_divide_the_width_are_refused(num_heads: int) -> None:
    with pytest.raises(ValueError, match=rf"skip_ca_heads \({num_heads}\) must divide the width .* \({WIDTH}\)"):
        SkipCrossAttention(WIDTH, num_heads=num_heads)
