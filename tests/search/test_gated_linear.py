"""The gated linear layer of an FFN against the naive reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import reference
from layers import DOUBLE, observe
from spvit.search.gated_linear import GatedLinear
from tiny import assert_all_close, assert_close, randomise


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_linear_equals_the_reference(bias: bool, training: bool) -> None:
    layer = randomise(GatedLinear(nn.Linear(16, 6, bias=bias))).to(DOUBLE).train(training)
    uniforms = torch.rand(16, generator=torch.Generator().manual_seed(2), dtype=DOUBLE) if training else None
    layer.draws.fix_uniforms(uniforms)
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    twin = reference.install(copy.deepcopy(layer), uniforms)
    out, gradients, _ = observe(layer, hidden.clone().requires_grad_())
    expected_out, expected_gradients, _ = observe(twin, hidden.clone().requires_grad_())
    assert_close(out, expected_out)
    if not training:  # a threshold has no gradient
        assert gradients.pop("gate_logits") is None
        assert expected_gradients.pop("gate_logits") is None
    assert_all_close(gradients, expected_gradients)
    assert 0 < (layer.linear.weight.grad == 0).all(dim=0).sum() < 16
