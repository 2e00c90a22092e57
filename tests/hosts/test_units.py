"""Fewer units of an FFN: its linear layers keep rows and columns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layers import DOUBLE
from spvit.hosts.units import narrowed
from tiny import assert_close


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("units", [[0, 2, 5], [], [3]])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_narrower_linear_layer_selects(axis: int, units: list[int], bias: bool) -> None:
    linear = nn.Linear(6, 6, bias=bias, dtype=DOUBLE).eval()
    linear.weight.requires_grad_(False)
    narrow = narrowed(linear, torch.tensor(units, dtype=torch.long), axis)
    expected = linear.weight[units] if axis == 0 else linear.weight[:, units]
    assert torch.equal(narrow.weight, expected)
    assert (narrow.out_features, narrow.in_features) == tuple(expected.shape)
    assert not narrow.training
    assert not narrow.weight.requires_grad
    if not bias:
        assert narrow.bias is None
        return
    assert torch.equal(narrow.bias, linear.bias[units] if axis == 0 else linear.bias)
    assert narrow.bias.requires_grad
    assert narrow.weight.data_ptr() != linear.weight.data_ptr()
    x = torch.randn(2, narrow.in_features, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    assert_close(narrow(x), x @ expected.T + narrow.bias)
