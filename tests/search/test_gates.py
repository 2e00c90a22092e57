"""Gates: their values, their gradients against the specification, and one draw a step for a whole network."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import reference
import spvit
from spvit.search import gates
from spvit.search.network import gated_layers
from tiny import assert_close, assert_differ, backward, images, logits, make_host, make_net

LOGITS = torch.tensor([1.5, -0.7, 0.0, 3.0, -2.0], dtype=torch.float64)
PATTERNS = list(itertools.product([False, True], repeat=3))


def _value_and_gradient(function, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function's value, and the gradient by its first argument of a sum with uneven weights."""
    first = tensors[0].clone().requires_grad_()
    value = function(first, *tensors[1:])
    value = torch.stack(list(value)) if isinstance(value, tuple) else value
    (value * torch.arange(1, len(value) + 1)).sum().backward()
    return value.detach(), first.grad


def test_log_odds() -> None:
    uniform = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert_close(gates.log_odds(uniform), torch.log(uniform / (1 - uniform)))
    assert gates.log_odds(torch.zeros(1)).item() == -math.inf


def test_straight_through_is_the_specified_sample() -> None:
    uniforms = torch.rand(len(LOGITS), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, gradient = _value_and_gradient(gates.straight_through, LOGITS, gates.log_odds(uniforms))
    expected_value, expected_gradient = _value_and_gradient(reference.sample, LOGITS, uniforms)
    assert set(value.round().tolist()) == {0.0, 1.0}
    assert_close(value, expected_value)
    assert_close(gradient, expected_gradient)
    assert (gradient > 0).all()


def test_a_uniform_of_zero_closes_the_gate_and_stays_finite() -> None:
    value, gradient = _value_and_gradient(gates.straight_through, LOGITS, gates.log_odds(torch.zeros(len(LOGITS))))
    assert (value == 0).all()
    assert torch.isfinite(gradient).all()


def test_gates_open_as_often_as_their_probability_says() -> None:
    uniforms = torch.rand(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share = gates.straight_through(LOGITS, gates.log_odds(uniforms)).mean(dim=0)
    assert (share - torch.sigmoid(LOGITS)).abs().max() < 0.015  # four standard deviations


def test_is_open_in_evaluation() -> None:
    assert gates.is_open(LOGITS).tolist() == [True, False, False, True, False]
    assert gates.is_open(LOGITS).tolist() == (torch.sigmoid(LOGITS) > 0.5).tolist()


def test_expected_is_the_specified_expectation() -> None:
    value, gradient = _value_and_gradient(gates.expected, LOGITS)
    loops = [_value_and_gradient(lambda t: reference.expected_gate(t).view(1), LOGITS[i]) for i in range(len(LOGITS))]
    assert_close(value, torch.cat([item for item, _ in loops]))
    assert_close(gradient, torch.stack([item for _, item in loops]) * torch.arange(1, len(LOGITS) + 1))


@pytest.mark.parametrize("bits", PATTERNS)
def test_nest_multiplies_and_detaches_as_specified(bits: tuple[bool, ...]) -> None:
    pattern = torch.tensor([float(bit) for bit in bits], dtype=torch.float64)
    value, gradient = _value_and_gradient(gates.nest, pattern)
    expected_value, expected_gradient = _value_and_gradient(reference.nested, pattern)
    assert torch.equal(value, expected_value)
    assert torch.equal(gradient, expected_gradient)
    assert value.sum() == gates.opened(bits)


def test_nest_works_on_a_batch_of_layers() -> None:
    layers = torch.tensor([[float(bit) for bit in bits] for bits in PATTERNS], dtype=torch.float64)
    assert torch.equal(gates.nest(layers), torch.stack([gates.nest(row) for row in layers]))


def test_opened_counts_to_the_first_closed_gate() -> None:
    assert [gates.opened(bits) for bits in PATTERNS] == [0, 0, 0, 0, 1, 1, 2, 3]


def test_wrong_number_of_uniforms_is_refused() -> None:
    net = make_net("class_token")[1]
    layer = gated_layers(net)[0][0]
    total = sum(len(parameter) for parameter in spvit.gate_parameters(net))
    with pytest.raises(ValueError, match=rf"uniforms have shape \(3,\), expected \({total},\): one a gate"):
        layer.draws.fix_uniforms(torch.rand(3))


def test_a_forward_pass_draws_once_for_the_whole_network() -> None:
    host, net = make_net("class_token")
    x = images(host)
    net.train()
    total = sum(len(parameter) for parameter in spvit.gate_parameters(net))
    torch.manual_seed(5)
    out = logits(net, x)
    after_step = torch.rand(4)
    torch.manual_seed(5)
    uniforms = torch.rand(total)
    assert torch.equal(torch.rand(4), after_step)
    gated_layers(net)[0][0].draws.fix_uniforms(uniforms)
    assert torch.equal(logits(net, x), out)
    gated_layers(net)[0][0].draws.fix_uniforms(None)
    torch.manual_seed(6)
    assert_differ(logits(net, x), out)


def test_uniforms_are_given_out_in_the_order_of_the_network() -> None:
    _, net = make_net("class_token")
    parameters = spvit.gate_parameters(net)
    closed = [torch.full_like(parameter, 1e-9) for parameter in parameters]
    closed[2] = torch.full_like(closed[2], 1 - 1e-9)  # the second block's attention
    draws = gated_layers(net)[0][0].draws
    draws.fix_uniforms(torch.cat(closed))
    for index, pair in enumerate(gated_layers(net)):
        for layer in pair:
            is_chosen = layer is pair[0] and index == 1
            noise = draws.noise(layer)
            assert noise.shape == layer.gate_logits.shape
            assert ((noise > 0) == is_chosen).all()


def test_the_same_seed_gives_the_same_step() -> None:
    host, net = make_net("class_token")
    x = images(host)
    net.train()
    steps = []
    for seed in (3, 3, 4):
        twin = copy.deepcopy(net)
        torch.manual_seed(seed)
        steps.append({**backward(twin, x), **dict(twin.named_buffers())})
    first, again, other = steps
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("frozen_blocks", [0, 1, 3])
def test_gates_are_drawn_anew_each_pass(frozen_blocks: int) -> None:
    host, net = make_net("class_token")
    x = images(host)
    net.train()
    for block in net.blocks[:frozen_blocks]:
        block.eval()
    torch.manual_seed(0)
    outs = [logits(net, x) for _ in range(3)]
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])


def test_gate_logits_start_where_asked_in_the_host_s_dtype() -> None:
    host = make_host("class_token", torch.bfloat16)
    for theta in (1.5, -0.5):
        net = spvit.make_searchable(host, gate_logit=theta)
        for parameter in spvit.gate_parameters(net):
            assert isinstance(parameter, nn.Parameter)
            assert parameter.dtype == torch.bfloat16
            assert (parameter == theta).all()
    assert (spvit.gate_parameters(spvit.make_searchable(host))[0] == gates.INITIAL_LOGIT).all()
