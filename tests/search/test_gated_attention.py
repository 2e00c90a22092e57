"""The gated layers against the naive reference: outputs, gradients and running statistics, in all gate patterns."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import reference
import spvit
from layers import DIM, DOUBLE, HEADS, gate, make_attention, make_layer, observe, tokens
from spvit.architecture import KINDS
from spvit.search.gated_attention import candidate_mixture, gate_sensitivity
from spvit.search.network import gated_layers
from tiny import (
    HOSTS,
    MIXED,
    ONE_A_FAMILY,
    assert_all_close,
    assert_close,
    assert_differ,
    backward,
    choose,
    gate_signs,
    images,
    largest,
    logits,
    make_net,
    randomise,
)

PATTERNS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("bits", PATTERNS)
@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("library", ["timm", "huggingface"])
def test_training_pass_equals_the_reference(
    library: str, bias: bool, prefix_tokens: int, bits: tuple[bool, ...]
) -> None:
    layer = make_layer(library, bias, prefix_tokens)
    twin = copy.deepcopy(layer)
    uniforms = reference.uniforms_for(layer.gate_logits, list(bits))
    layer.draws.fix_uniforms(uniforms)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    out, gradients, buffers = observe(layer, tokens(prefix_tokens))
    expected_out, expected_gradients, expected_buffers = observe(
        reference.install(twin, uniforms), tokens(prefix_tokens)
    )
    assert_close(out, expected_out)
    assert_all_close(gradients, expected_gradients)
    for name, buffer in expected_buffers.items():
        assert_close(buffers[name], buffer, what=name)
        assert_differ(buffers[name], before[name])
    assert layer.bn1.num_batches_tracked == layer.bn3.num_batches_tracked == 1
    assert layer.gate_logits.grad[0].item() != 0 or (bits[0] and bits[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", ["timm", "huggingface"])
def test_evaluation_equals_the_reference(library: str, kind: str) -> None:
    layer = make_layer(library).eval()
    with torch.no_grad():
        layer.gate_logits.copy_(0.3 * gate_signs(kind))
    twin = reference.install(copy.deepcopy(layer), None)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with torch.no_grad():
        out, expected = layer(tokens()), twin(tokens())
    if library == "huggingface":
        assert isinstance(out, tuple)
        out, expected = out[0], expected[0]
    assert layer.decided() == kind
    assert_close(out, expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert (not out.any()) == (kind == "skip")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_learn_through_the_decided_candidate_in_evaluation_mode(kind: str) -> None:
    layer = make_layer().eval()
    with torch.no_grad():
        layer.gate_logits.copy_(0.3 * gate_signs(kind))
    x = tokens()
    out = layer(x)
    if kind == "skip":
        assert not out.requires_grad
        return
    out.sum().backward()
    assert x.grad.any()
    assert layer.attention.qkv.weight.grad.any()
    assert (layer.head_logits.grad is not None) == (kind != "msa")


@pytest.mark.parametrize("bits", PATTERNS)
def test_frozen_gates_change_nothing_for_the_rest(bits: tuple[bool, ...]) -> None:
    layer = make_layer()
    uniforms = reference.uniforms_for(layer.gate_logits, list(bits))
    layer.draws.fix_uniforms(uniforms)
    frozen = copy.deepcopy(layer)
    frozen.gate_logits.requires_grad_(False)
    silent = copy.deepcopy(layer)
    out, gradients, buffers = observe(layer, tokens())
    frozen_out, frozen_gradients, frozen_buffers = observe(frozen, tokens())
    with torch.no_grad():
        silent_out = silent(tokens())
    assert_close(frozen_out, out)
    assert_close(silent_out, out)
    assert frozen_gradients.pop("gate_logits") is None
    gradients.pop("gate_logits")
    assert_all_close(frozen_gradients, gradients)
    for name, buffer in buffers.items():
        assert_close(frozen_buffers[name], buffer)
        assert_close(silent.get_buffer(name), buffer)


@pytest.mark.parametrize("bits", PATTERNS)
def test_frozen_weights_leave_the_gates_gradient(bits: tuple[bool, ...]) -> None:
    layer = make_layer()
    layer.draws.fix_uniforms(reference.uniforms_for(layer.gate_logits, list(bits)))
    frozen = copy.deepcopy(layer)
    frozen.attention.requires_grad_(False)
    expected = observe(layer, tokens())[1]
    gradients = observe(frozen, tokens())[1]
    assert_close(gradients["gate_logits"], expected["gate_logits"])
    assert_close(gradients["x"], expected["x"], largest(list(expected.values())))
    assert gradients["attention.qkv.weight"] is None


def test_further_arguments_reach_the_attention() -> None:
    layer = make_layer()
    layer.draws.fix_uniforms(reference.uniforms_for(layer.gate_logits, [True] * 3))
    count = tokens().shape[1]
    mask = torch.zeros(count, count, dtype=DOUBLE)
    mask[:, 3:] = -torch.inf
    assert_differ(layer(tokens(), mask).detach(), layer(tokens()).detach())
    assert_close(layer(tokens(), attn_mask=mask).detach(), layer.attention(tokens(), mask).detach())


def test_the_grid_must_fit_the_tokens() -> None:
    layer = make_layer()
    for training in (True, False):
        layer.train(training)
        with torch.no_grad():
            layer.gate_logits.fill_(-1).neg_() if training else layer.gate_logits.copy_(torch.tensor([1.0, -1, 1]))
        with pytest.raises(ValueError, match="got 11 grid tokens, expected a grid of 3 x 4; call the whole model"):
            layer(tokens()[:, 1:])


@pytest.mark.parametrize("bits", PATTERNS)
def test_mixture_and_sensitivity_follow_the_formula(bits: tuple[bool, ...]) -> None:
    gates = torch.tensor([float(bit) for bit in bits], dtype=DOUBLE, requires_grad=True)
    c1, c2, c3 = reference.nested(gates)
    expected = torch.stack([c3, c2 * (1 - c3), c1 * (1 - c2) * (1 - c3)])
    assert torch.equal(candidate_mixture(gates), expected)
    assert expected.sum() in (0, 1)
    for column in range(3):
        (gradient,) = torch.autograd.grad(expected[column], gates, retain_graph=True, allow_unused=True)
        found = [row[column] for row in gate_sensitivity(bits)]
        assert found == ([0.0] * 3 if gradient is None else gradient.tolist())


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_the_package_may_be_imported_where_no_gradients_are_kept(without: Callable[[], Any]) -> None:
    with without():
        found = gate_sensitivity((True, True, True))
    assert found == [[1, -1, 0]] * 3


@pytest.mark.parametrize(
    ("name", "size", "seeds"),
    [
        ("class_token", None, 3),
        ("average_pooling", None, 3),
        ("no_biases", None, 3),
        ("dynamic", (48, 80), 3),
        ("dynamic", (80, 48), 3),
        ("huggingface", None, 3),
        ("swin", None, 1),
        ("swin_padded", None, 3),
        ("swin_always_partition", None, 1),
        ("swin_dynamic", (24, 28), 1),
    ],
)
def test_a_whole_network_learns_as_the_reference_does(name: str, size: tuple[int, int] | None, seeds: int) -> None:
    host, start = make_net(name)
    x = images(host, size=size)
    total = sum(len(parameter) for parameter in spvit.gate_parameters(start))
    for seed in range(seeds):
        net = copy.deepcopy(start).train()
        uniforms = torch.rand(total, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        twin = reference.install(copy.deepcopy(net), uniforms)
        gated_layers(net)[0][0].draws.fix_uniforms(uniforms)
        assert_all_close(backward(net, x), backward(twin, x))
        for own, other in zip(net.buffers(), twin.buffers()):
            if own.is_floating_point():
                assert_close(own, other)


@pytest.mark.parametrize("name", [name for name in HOSTS if name.startswith("swin")])
def test_a_whole_network_answers_as_the_reference_does(name: str) -> None:
    host, net = make_net(name, ("msa", "conv3", "conv3", "msa"))
    x = images(host)
    assert_close(logits(net, x), logits(reference.install(copy.deepcopy(net), None), x))


@pytest.mark.parametrize("bits", [(True, True, True), (True, True, False), (True, False, False)])
@pytest.mark.parametrize("batch", [1, 5, 7])
def test_batches_of_any_size_equal_the_reference(batch: int, bits: tuple[bool, ...]) -> None:
    layer = make_layer()
    twin = copy.deepcopy(layer)
    uniforms = reference.uniforms_for(layer.gate_logits, list(bits))
    layer.draws.fix_uniforms(uniforms)
    out, gradients, _ = observe(layer, tokens(batch=batch))
    expected_out, expected_gradients, _ = observe(reference.install(twin, uniforms), tokens(batch=batch))
    assert_close(out, expected_out)
    assert_all_close(gradients, expected_gradients)


@pytest.mark.parametrize("kinds", [MIXED, ("msa",) * 4])
@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_bfloat16_autocast_stays_close_to_float32(name: str, kinds: tuple[str, ...]) -> None:
    host, net = make_net(name, dtype=torch.float32)
    net.train()
    uniforms = []
    for (attention, ffn), kind in zip(gated_layers(net), kinds):
        uniforms.append(reference.uniforms_for(attention.gate_logits, (gate_signs(kind) > 0).tolist()))
        uniforms.append(torch.rand(len(ffn.gate_logits), generator=torch.Generator().manual_seed(1)))
    gated_layers(net)[0][0].draws.fix_uniforms(torch.cat(uniforms))
    x = images(host)
    exact, exact_logits = backward(net, x), logits(net, x)
    with torch.autocast("cpu", torch.bfloat16):
        loose, loose_logits = backward(net, x), logits(net, x)
    # bfloat16 keeps 8 bits: 1 part in 256 a rounding, and some dozens of roundings in a row.
    assert (loose_logits - exact_logits).abs().max() < 0.1 * exact_logits.abs().max()
    assert loose.keys() == exact.keys()
    scale = largest(list(exact.values()))
    for name, gradient in loose.items():
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all()
        assert (gradient - exact[name]).abs().max() < 0.1 * scale, name


def test_layers_start_from_equal_heads_and_fresh_batch_norms() -> None:
    layer = gate(make_attention("timm", True))
    assert (layer.head_logits == 1).all()
    assert layer.head_logits.shape == (HEADS, 9)
    assert layer.gate_logits.shape == (3,)
    assert_close(layer.head_mix(), torch.full((HEADS, 9), 1 / HEADS))
    for bn in (layer.bn1, layer.bn3):
        assert (bn.num_features, bn.eps, bn.momentum) == (DIM // HEADS, 1e-5, 0.1)
    assert layer.training == layer.attention.training


def test_temperature_is_the_family_s_unless_given() -> None:
    assert {layer.temperature for layer, _ in gated_layers(make_net("swin")[1])} == {100.0}
    host, net = make_net("class_token")
    assert {layer.temperature for layer, _ in gated_layers(net)} == {0.01}
    warm = choose(randomise(spvit.make_searchable(host, temperature=1.0), seed=1), MIXED)
    assert {layer.temperature for layer, _ in gated_layers(warm)} == {1.0}
    assert_differ(logits(warm, images(host)), logits(net, images(host)))
