"""What the published implementation computed (shared/golden): attention, FFN, budget, and Swin's convolutions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import spvit
from golden import DIM, HEADS, golden, load_batchnorm, make_layer, needs_golden
from layers import site_of
from spvit.cost import NetworkCost
from spvit.hosts.grid import Grid
from spvit.hosts.timm_swin import TEMPERATURE, WindowedGrid
from spvit.hosts.weights import AttentionWeights
from spvit.replacements import kernels
from spvit.replacements.bottleneck import BottleneckConv
from spvit.replacements.skip import Skip
from spvit.search.gated_attention import GatedAttention
from spvit.search.gated_linear import GatedLinear
from tiny import assert_close

pytestmark = needs_golden

GATES = {"msa": (1.0, 1.0, 1.0), "conv3": (1.0, 1.0, -1.0), "conv1": (1.0, -1.0, 1.0), "skip": (-1.0, 1.0, 1.0)}
PUBLISHED_ORDER = [4, 0, 1, 2, 3, 5, 6, 7, 8]  # Swin's kernel positions, the centre first


@pytest.fixture(name="deit", scope="module")
def _deit() -> dict[str, Tensor]:
    return golden("deit_attention")


@pytest.mark.parametrize("kind", GATES)
def test_attention_in_evaluation(deit: dict[str, Tensor], kind: str) -> None:
    layer = make_layer(deit).eval()
    with torch.no_grad():
        layer.gate_logits.copy_(torch.tensor(GATES[kind]))
        assert layer.decided() == kind
        assert_close(layer(deit["x"]), deit[f"eval.{kind}"])


def test_skip_of_the_published_fine_tuning_is_the_normalised_input(deit: dict[str, Tensor]) -> None:
    assert torch.equal(Skip("normalised_input")(deit["x"]), deit["finetune.skip"])
    assert torch.equal(Skip("zero")(deit["x"]), deit["eval.skip"])


@pytest.mark.parametrize("bits", ["000", "010", "011", "100", "101", "110", "111"])
def test_attention_in_training(deit: dict[str, Tensor], bits: str) -> None:
    run = {key.removeprefix(f"train.{bits}."): value for key, value in deit.items() if key.startswith(f"train.{bits}.")}
    layer = make_layer(deit).train()
    with torch.no_grad():
        layer.gate_logits.copy_(torch.tensor([1.5, 1.2, 0.9]))
    layer.draws.fix_uniforms(run["u"])
    x = deit["x"].clone().requires_grad_()
    out = layer(x)
    (out * deit["grad_out"]).sum().backward()
    assert_close(out.detach(), run["out"])
    assert_close(x.grad, run["grad_x"])
    assert_close(layer.bn1.running_mean, run["bn_1x1.running_mean"])
    assert_close(layer.bn3.running_var, run["bn_3x3.running_var"])
    assert [int(bit) for bit in bits] == [int(bit) for bit in layer.draws.sampled_bits(layer)]

    qkv, proj = layer.attention.qkv, layer.attention.proj
    found = {"kernel_thresholds": layer.gate_logits.grad, "head_probs": layer.head_logits.grad}
    for part in ("weight", "bias"):
        gradient = getattr(qkv, part).grad
        found |= {f"qk.{part}": gradient[: 2 * DIM], f"v.{part}": gradient[2 * DIM :]}
        found |= {f"proj.{part}": getattr(proj, part).grad}
        found |= {f"bn_1x1.{part}": getattr(layer.bn1, part).grad, f"bn_3x3.{part}": getattr(layer.bn3, part).grad}
    assert {f"grad.{name}" for name in found} == {key for key in run if key.startswith("grad.")}
    largest_weight_gradient = run["grad.v.weight"].abs().max().item()
    for name, gradient in found.items():
        # A batch norm takes away what a bias before it adds: with a convolution, that gradient is rounding alone.
        scale = largest_weight_gradient if name == "v.bias" else None
        assert_close(gradient, run[f"grad.{name}"], scale, name)


def _ffn(tensors: dict[str, Tensor]) -> nn.Module:
    from timm.layers import Mlp

    mlp = Mlp(DIM, 192)
    mlp.load_state_dict({key.removeprefix("w."): value for key, value in tensors.items() if key.startswith("w.fc")})
    mlp.fc2 = GatedLinear(mlp.fc2)
    with torch.no_grad():
        mlp.fc2.gate_logits.copy_(tensors["w.ffn_thresholds"])
    return mlp


def test_ffn_in_evaluation() -> None:
    tensors = golden("deit_ffn")
    mlp = _ffn(tensors).eval()
    with torch.no_grad():
        assert_close(mlp(tensors["x"]), tensors["eval.out"])
    assert torch.equal((mlp.fc2.gate_logits > 0).float(), tensors["eval.kept"])
    assert 0 < tensors["eval.kept"].sum() < 192


def test_ffn_in_training() -> None:
    tensors = golden("deit_ffn")
    mlp = _ffn(tensors).train()
    mlp.fc2.draws.fix_uniforms(tensors["train.u"])
    x = tensors["x"].clone().requires_grad_()
    out = mlp(x)
    (out * tensors["grad_out"]).sum().backward()
    assert_close(out.detach(), tensors["train.out"])
    assert_close(x.grad, tensors["train.grad_x"])
    assert_close(mlp.fc2.gate_logits.grad, tensors["train.grad.ffn_thresholds"])
    for part in ("weight", "bias"):
        assert_close(getattr(mlp.fc1, part).grad, tensors[f"train.grad.fc1.{part}"])
        assert_close(getattr(mlp.fc2.linear, part).grad, tensors[f"train.grad.fc2.{part}"])


def test_budget() -> None:
    import timm

    tensors = golden("deit_budget")
    net = spvit.make_searchable(timm.create_model("deit_tiny_patch16_224"), inplace=True)
    loss = spvit.BudgetLoss(net, macs="1.0G")
    published = replace(loss.cost.blocks[0], unit=2 * 196 * 192)  # its count leaves the class token out of the FFN
    norms = 12 * 2 * 192 * 197  # and has these beside the embedding and the classifier
    loss.cost = NetworkCost("macs", loss.cost.fixed + norms, (published,) * 12)
    loss.weight = 20 * (loss.cost.dense / 1e9) ** 2
    with torch.no_grad():
        for (attention, ffn), kernel, units in zip(
            loss.layers, tensors["kernel_thresholds"], tensors["ffn_thresholds"], strict=True
        ):
            attention.gate_logits.copy_(kernel)
            ffn.gate_logits.copy_(units)
    architecture = spvit.decide(net)
    attention_macs = sum(published.attention(block.attention) for block in architecture.blocks)
    assert_close(torch.tensor([float(attention_macs)]), tensors["att_flops"])
    assert_close(torch.tensor([float(sum(architecture.widths()) * published.unit)]), tensors["ffn_flops"])
    assert_close(loss.expected_cost().detach(), tensors["flops"].squeeze())
    value = loss()
    value.backward()
    assert_close(value.detach(), tensors["loss"].squeeze())
    ffn_gradient = torch.stack([ffn.gate_logits.grad for _, ffn in loss.layers])
    assert_close(ffn_gradient, tensors["grad.ffn_thresholds"])
    attention_gradient = torch.stack([attention.gate_logits.grad for attention, _ in loss.layers])
    assert_close(attention_gradient, tensors["grad.kernel_thresholds"])


@torch.no_grad()
def make_window_layer(swin: dict[str, Tensor], grid: WindowedGrid) -> GatedAttention:
    """Return the gated layer of `swin_attention`, in evaluation mode."""
    from timm.models.swin_transformer import WindowAttention

    attention = WindowAttention(DIM, HEADS, window_size=grid.window)
    for part in ("weight", "bias"):
        getattr(attention.qkv, part).copy_(torch.cat([swin[f"w.qk.{part}"], swin[f"w.v.{part}"]]))
        getattr(attention.proj, part).copy_(swin[f"w.proj.{part}"])
    attention.relative_position_bias_table.copy_(swin["w.relative_position_bias_table"])
    site = site_of("timm", 0, DIM, HEADS, (grid.height, grid.width))
    layer = GatedAttention(attention, site, grid, swin["w.alpha"].item())
    layer.head_logits[:, PUBLISHED_ORDER] = swin["w.head_probs"]
    load_batchnorm(layer.bn1, swin, "bn_1x1")
    load_batchnorm(layer.bn3, swin, "bn_3x3")
    return layer.eval()


@pytest.mark.parametrize("kind", ["msa", "conv1", "skip", "conv3"])
def test_window_attention_in_evaluation(kind: str) -> None:
    swin = golden("swin_attention")
    # Two windows an image, side by side. For conv3 the published code pads each window, that is, takes it for a map.
    across = 7 if kind == "conv3" else 14
    layer = make_window_layer(swin, WindowedGrid(7, across, window=(7, 7), shift=(0, 0)))
    with torch.no_grad():
        layer.gate_logits.copy_(torch.tensor(GATES[kind]))
        assert layer.decided() == kind
        out = layer(swin["x"], mask=swin["mask"])
    assert_close(out, swin["eval.conv3_windowed" if kind == "conv3" else f"eval.{kind}"])


def test_swin_temperature_is_the_published_one() -> None:
    assert golden("swin_attention")["w.alpha"].item() == TEMPERATURE


@pytest.mark.parametrize("kind", ["conv3", "conv1"])
def test_swin_convolutions_on_the_whole_map(kind: str) -> None:
    # Unlike in deit_attention, the running statistics stored here are the ones that the outputs were computed with.
    swin = golden("swin_attention")
    width = DIM // HEADS
    head_logits = torch.empty_like(swin["w.head_probs"])
    head_logits[:, PUBLISHED_ORDER] = swin["w.head_probs"]
    value = swin["w.v.weight"].unflatten(0, (HEADS, width))
    weights = AttentionWeights(
        value,  # queries and keys have no part in convolutions
        None,
        value,
        None,
        value,
        swin["w.v.bias"].unflatten(0, (HEADS, width)),
        swin["w.proj.weight"].unflatten(1, (HEADS, width)),
        swin["w.proj.bias"],
    )
    mix = kernels.head_mix(head_logits, swin["w.alpha"].item())
    convert = kernels.conv3_weights if kind == "conv3" else kernels.conv1_weights
    bn = nn.BatchNorm2d(width)
    load_batchnorm(bn, swin, "bn_3x3" if kind == "conv3" else "bn_1x1")
    bottleneck = BottleneckConv(convert(mix, weights), bn, 0, Grid(8, 8)).eval()
    with torch.no_grad():
        assert_close(bottleneck(swin["map.x"]), swin[f"map.{kind}"])
        bottleneck.fold_batchnorm()
        assert_close(bottleneck(swin["map.x"]), swin[f"map.{kind}"])
