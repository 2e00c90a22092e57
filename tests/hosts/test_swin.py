"""What is Swin's own: windows, shifts, padding and stages, while searching and in the pruned network."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reference
import spvit
from spvit.architecture import FFN, KINDS, Architecture, Attention, dense
from spvit.cli.main import main
from spvit.cost import count_macs, count_params
from spvit.hosts import family_of
from spvit.hosts.base import network_costs
from spvit.hosts.timm_swin import WindowedGrid
from spvit.pruned import BottleneckConv, Grid
from spvit.searchable import SearchableAttention
from spvit.surgery import gated_layers, search_record
from tiny import (
    FAMILY_OF,
    MIXED,
    assert_close,
    assert_differ,
    backward,
    choose,
    ffn_widths,
    images,
    largest,
    logits,
    make_host,
    make_net,
    randomise,
    with_kinds,
)

timm = pytest.importorskip("timm")

SWINS = [name for name, family in FAMILY_OF.items() if family == "timm_swin"]
MIXES = {
    "shifted conv3": ("skip", "conv3", "msa", "conv3"),
    "shifted msa": ("conv1", "msa", "conv3", "conv1"),
    **{kind: (kind,) * 4 for kind in KINDS[1:]},
}


def blocks_of(net: nn.Module) -> list[Any]:
    """Return the blocks of all stages."""
    return [block for stage in net.layers for block in stage.blocks]


@pytest.mark.parametrize("kinds", MIXES)
@pytest.mark.parametrize("name", SWINS)
def test_searchable_pruned_and_folded_agree_in_every_block(name: str, kinds: str) -> None:
    host, net = make_net(name, MIXES[kinds])
    x = images(host)
    expected = logits(net, x)
    pruned = spvit.prune(host, spvit.decide(net), weights=net)
    assert_close(logits(pruned, x), expected)
    assert_close(logits(spvit.fold(pruned), x), expected)
    assert_differ(logits(host, x), expected)


@pytest.mark.parametrize("name", SWINS)
def test_evaluation_equals_the_reference(name: str) -> None:
    host, net = make_net(name, ("msa", "conv3", "conv3", "msa"))
    x = images(host)
    assert_close(logits(net, x), logits(reference.install(copy.deepcopy(net), None), x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", range(4))
def test_every_decision_shows_in_the_logits(block: int, kind: str) -> None:
    host, net = make_net("swin_padded")
    x = images(host)
    kinds = (*MIXED[:block], kind, *MIXED[block + 1 :])
    found = logits(spvit.prune(host, with_kinds(spvit.decide(net), *kinds), weights=net), x)
    assert_close(found, logits(choose(copy.deepcopy(net), kinds), x))
    (assert_close if kind == MIXED[block] else assert_differ)(found, logits(net, x))


def test_windows_are_taken_apart_token_by_token() -> None:
    for grid in (
        WindowedGrid(8, 12, window=(4, 3), shift=(0, 0)),
        WindowedGrid(7, 10, window=(4, 4), shift=(2, 1)),
        WindowedGrid(3, 5, window=(7, 7), shift=(3, 3)),
    ):
        tokens = 1 + torch.arange(2 * grid.height * grid.width * 2.0).view(2, -1, 2)
        windows = reference.map_to_windows(tokens, grid)
        assert torch.equal(grid.scatter(tokens), windows)
        padding_filled = torch.where(windows == 0, -1.0, windows)
        assert torch.equal(grid.gather(padding_filled, 0), tokens)
        assert torch.equal(reference.windows_to_map(windows, grid), tokens)
        assert len(reference.window_places(grid)) == grid.windows()[0] * grid.windows()[1]


def test_windows_must_fit_the_grid() -> None:
    grid = WindowedGrid(8, 8, window=(4, 4), shift=(0, 0))
    message = "convolution got {} windows of {} tokens, expected 4 an image of 4 x 4; call the whole model on images"
    for windows, tokens in ((6, 16), (4, 15)):
        with pytest.raises(ValueError, match=message.format(windows, tokens)):
            grid.gather(torch.zeros(windows, tokens, 3), 0)


def test_replaced_blocks_shuffle_nothing_and_kept_blocks_are_as_they_were() -> None:
    host, net = make_net("swin", ("msa", "conv3", "skip", "msa"))
    pruned = spvit.prune(host, spvit.decide(net))
    kept, conv3, skip, last = blocks_of(pruned)
    seen = {}
    for block in (conv3, skip):
        block.attn.register_forward_hook(lambda module, args, out: seen.update({module: args[0].shape}))
    logits(pruned, images(host))
    assert seen == {conv3.attn: (2, 16 * 16, 24), skip.attn: (2, 8 * 8, 48)}
    for block, size in ((conv3, (16, 16)), (skip, (8, 8))):
        assert (block.window_size, block.shift_size, block.attn_mask) == (size, (0, 0), None)
    assert type(skip.norm1) is nn.Identity
    assert not list(skip.attn.parameters())
    for block, own in ((kept, blocks_of(host)[0]), (last, blocks_of(host)[3])):
        assert type(block.attn) is type(own.attn)
        assert (block.window_size, block.shift_size) == (own.window_size, own.shift_size)
        assert not block._forward_pre_hooks
        for part in ("norm1", "attn", "norm2"):
            state = getattr(own, part).state_dict()
            assert list(getattr(block, part).state_dict()) == list(state)
            assert all(torch.equal(getattr(block, part).state_dict()[key], value) for key, value in state.items())
    assert torch.equal(last.attn_mask, blocks_of(host)[3].attn_mask)


def test_fused_attention_gives_its_values_too() -> None:
    host, net = make_net("swin_padded", ("msa",) * 4)
    for model in (host, net):
        for block in blocks_of(model):
            getattr(block.attn, "attention", block.attn).fused_attn = True
    x = images(host)
    assert torch.equal(logits(spvit.make_searchable(host), x), logits(host, x))
    net.train()
    total = sum(len(parameter) for parameter in spvit.gate_parameters(net))
    uniforms = torch.rand(total, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    twin = reference.install(copy.deepcopy(net), uniforms)
    gated_layers(net)[0][0].draws.fix_uniforms(uniforms)
    assert_close(logits(net, x), logits(twin, x))


def test_skip_can_mean_the_normalised_input() -> None:
    host = make_host("swin")
    x = images(host)
    architecture = with_kinds(dense(ffn_widths(host)), "msa", "skip", "msa", "msa")
    architecture = replace(architecture, skip_rule="normalised_input")
    expected = copy.deepcopy(host)
    blocks_of(expected)[1].attn.forward = lambda windows, mask: windows
    assert_close(logits(spvit.prune(host, architecture), x), logits(expected, x))


def test_heads_start_nearly_equal_at_swin_s_temperature() -> None:
    _, net = make_net("swin")
    assert {layer.temperature for layer, _ in gated_layers(net)} == {100.0}


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("budget", ["55%", "75%"])
def test_decisions_land_on_the_budget_with_stages_of_different_widths(metric: str, budget: str) -> None:
    _, net = make_net("swin", ("msa", "conv1", "msa", "conv3"))
    cost = search_record(net).costs[metric]
    architecture = spvit.decide(net, **{metric: budget})
    target = cost.dense * float(budget[:-1]) / 100
    assert abs(cost.of(architecture) - target) <= 0.005 * target
    assert [block.ffn.width for block in architecture.blocks] == [72, 72, 144, 144]
    loss = spvit.BudgetLoss(net, **{metric: budget})
    assert loss.expected_cost().item() == cost.of(spvit.decide(net))


def test_costs_are_the_formulas_of_the_method() -> None:
    host = make_host("swin", torch.float32)
    costs = network_costs(family_of(host), host)["macs"]
    for block, n, d, e in zip(costs.blocks, (256, 256, 64, 64), (24, 24, 48, 48), (8, 8, 12, 12)):
        assert block.msa == 4 * n * d**2 + 2 * d * n * 16
        assert (block.conv3, block.conv1, block.unit) == (10 * d * e * n, 2 * d * e * n, 2 * n * d)
    merging = 64 * (4 * 24) * 48
    assert costs.fixed == 256 * 12 * 24 + merging + 48 * 7


@pytest.mark.parametrize("kinds", [MIXED, MIXES["shifted conv3"]])
@pytest.mark.parametrize("size", [(24, 40), (30, 34), (32, 32)])
def test_costs_follow_the_input_size(size: tuple[int, int], kinds: tuple[str, ...]) -> None:
    host = make_host("swin", torch.float32)
    host.set_input_size(size)
    costs = network_costs(family_of(host), host)
    architecture = with_kinds(dense(ffn_widths(host)), *kinds)
    small = spvit.fold(spvit.prune(host, architecture))
    x = images(host, batch=1)
    assert x.shape[2:] == size
    assert costs["macs"].of(architecture) == count_macs(small, lambda twin: twin(x.to("meta")))
    assert costs["params"].of(architecture) == count_params(small)
    net = choose(randomise(spvit.make_searchable(host), seed=1), kinds)
    assert_close(logits(spvit.prune(host, spvit.decide(net), weights=net), x), logits(net, x))


@pytest.mark.parametrize("name", ["swin", "swin_dynamic"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_copies_work_on_their_own(name: str, duplicate: Any) -> None:
    host, net = make_net(name)
    x, other = images(host), images(host, size=(24, 40) if name == "swin_dynamic" else None, seed=5)
    pruned = spvit.prune(host, spvit.decide(net), weights=net)
    for model in (net, pruned):
        expected = logits(model, x)
        twin = duplicate(model)
        grids = [module.grid for module in twin.modules() if isinstance(module, (SearchableAttention, BottleneckConv))]
        assert grids
        logits(model, other)
        assert torch.equal(logits(twin, x), expected)
        assert not any(
            grid is module.grid
            for grid in grids
            for module in model.modules()
            if isinstance(module, (SearchableAttention, BottleneckConv))
        )


def test_each_block_has_its_own_grid() -> None:
    _, net = make_net("swin_non_square")
    grids = [layer.grid for layer, _ in gated_layers(net)]
    assert [(grid.height, grid.width, grid.shift) for grid in grids] == [
        (12, 20, (0, 0)),
        (12, 20, (2, 2)),
        (6, 10, (0, 0)),
        (6, 10, (2, 2)),
    ]
    host = make_host("swin_non_square")
    pruned = spvit.prune(host, with_kinds(dense(ffn_widths(host)), *("conv3",) * 4))
    assert [block.attn.grid for block in blocks_of(pruned)] == [Grid(12, 20), Grid(12, 20), Grid(6, 10), Grid(6, 10)]


@pytest.mark.parametrize("seed", [0, 1])
def test_gradient_checkpointing_changes_no_gradient(seed: int) -> None:
    host, net = make_net("swin_padded")
    x = images(host)
    checkpointed = copy.deepcopy(host)
    checkpointed.set_grad_checkpointing(True)
    other = spvit.make_searchable(checkpointed)
    other.load_state_dict(net.state_dict())
    torch.manual_seed(seed)
    expected = backward(net.train(), x)
    torch.manual_seed(seed)
    gradients = backward(other.train(), x)
    assert gradients.keys() == expected.keys()
    scale = largest(list(expected.values()))
    for key, value in expected.items():
        assert_close(gradients[key], value, scale, key)


@pytest.mark.parametrize("kinds", [MIXED, ("msa",) * 4])
def test_bfloat16_autocast_stays_close_to_float32(kinds: tuple[str, ...]) -> None:
    host, net = make_net("swin_padded", kinds, torch.float32)
    torch.manual_seed(0)
    x = images(host)
    exact, exact_logits = backward(net.train(), x), logits(net.eval(), x)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loose, loose_logits = backward(net.train(), x), logits(net.eval(), x)
    assert (loose_logits - exact_logits).abs().max() < 0.1 * exact_logits.abs().max()
    scale = largest(list(exact.values()))
    for name, gradient in loose.items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).abs().max() < 0.1 * scale, name


@pytest.mark.parametrize("stage", ["make_searchable", "prune", "fold"])
def test_dtype_device_training_flag_and_requires_grad_survive(stage: str) -> None:
    host = make_host("swin", torch.bfloat16).to("meta").train()
    first, last = "layers.0.blocks.0.", "layers.1.blocks.1."
    host.get_submodule(first[:-1]).eval()
    host.get_submodule(last[:-1]).requires_grad_(False)
    if stage == "make_searchable":
        net = spvit.make_searchable(host)
    else:
        net = spvit.prune(host, with_kinds(dense(ffn_widths(host)), "conv3", "skip", "msa", "conv1"))
        net = spvit.fold(net) if stage == "fold" else net
    for name, module in net.named_modules():
        assert module.training == (not f"{name}.".startswith(first)), name
    for name, parameter in net.named_parameters():
        ours = any(part in name for part in ("gate_logits", "head_logits", "bn1", "bn3"))
        assert parameter.requires_grad == (not name.startswith(last) or ours), name
    tensors = [*net.parameters(), *net.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.bfloat16}


def test_a_swin_is_compressed_and_profiled_from_the_command_line(capsys: Any, tmp_path: Path) -> None:
    small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2]}
    model = ["--model", "swin_tiny_patch4_window7_224", "--model_args", json.dumps({**small, "window_size": 2})]
    model += ["--pretrained", "false"]
    images = {"batch_size": 128, "mean": [0.5], "std": [0.5], "crop": 1.0, "flip": 0.0}
    shared = [*model, "--data", "digits", "--images", json.dumps(images), "--macs", "60%"]
    epochs = [f"--{phase}.epochs=1" for phase in ("dense", "search", "finetune")]
    assert main(["compress", *shared, *epochs, "--output", str(tmp_path / "run")]) == 0
    loaded = spvit.load(tmp_path / "run")
    assert type(loaded) is timm.models.SwinTransformer
    assert loaded(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert main(["profile", "--model", str(tmp_path / "run")]) == 0
    assert main(["profile", *model]) == 0
    assert "share" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["swin_padded", "class_token"])
def test_weights_of_another_host_are_refused(other: str) -> None:
    host = make_host("swin")
    with pytest.raises(spvit.NotSearchableError, match="the searchable network was made from another host: "):
        spvit.prune(host, dense(ffn_widths(host)), weights=make_net(other)[1])


def test_architectures_of_other_widths_are_refused() -> None:
    with pytest.raises(spvit.ArchitectureError, match="block 2: the architecture is for an FFN of 72 units, but this "):
        spvit.prune(make_host("swin"), dense([72] * 4))


@pytest.mark.parametrize("name", SWINS)
def test_a_repaired_skip_adds_the_mean_over_the_map(name: str) -> None:
    host = make_host(name)
    kinds = ("msa", "skip", "msa", "msa")
    architecture = replace(with_kinds(dense(ffn_widths(host)), *kinds), skip_rule="mean")
    x = images(host, batch=5)
    pruned = spvit.prune(host, architecture, repair=x)
    first, second = blocks_of(host)[:2]
    with torch.no_grad():
        inputs = first(host.patch_embed(x))
        attended = second._attn(second.norm1(inputs))  # [B, height, width, D], by timm's own way
    assert_close(blocks_of(pruned)[1].attn.mean.bias, attended.mean((0, 1, 2))[None])


@pytest.mark.parametrize("kinds", [MIXED, *list(MIXES.values())[:2]])
@pytest.mark.parametrize("name", ["swin", "swin_padded", "swin_always_partition"])
def test_repair_brings_a_pruned_network_nearer_to_the_dense_one(name: str, kinds: tuple[str, ...]) -> None:
    host = make_host(name)
    architecture = replace(with_kinds(dense(ffn_widths(host)), *kinds), skip_rule="mean")
    blocks = [replace(block, ffn=FFN(block.ffn.width, block.ffn.units[::2])) for block in architecture.blocks]
    architecture = replace(architecture, blocks=tuple(blocks))
    x, unseen = images(host, batch=64), images(host, batch=16, seed=1)
    expected = logits(host, unseen)
    errors = [
        (logits(spvit.prune(host, architecture, repair=repair), unseen) - expected).square().mean().item()
        for repair in (None, x)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_swins_are_decided_from_calibration_images() -> None:
    host = make_host("swin_padded", torch.float32)
    x = images(host, batch=64)
    expected = logits(host, x)
    architecture = spvit.decide(host, macs="70%", calibration=x)
    cost = network_costs(family_of(host), host)["macs"]
    assert abs(cost.of(architecture) / cost.dense - 0.7) <= 0.0035
    small = spvit.fold(spvit.prune(host, architecture, repair=x))
    assert count_macs(small, lambda twin: twin(x[:1].to("meta"))) == cost.of(architecture)
    assert torch.equal(logits(host, x), expected)
    assert not any(module._forward_pre_hooks for module in host.modules())


def test_window_attention_cannot_be_narrowed() -> None:
    host = make_host("swin")
    everything = dense(ffn_widths(host))
    blocks = (replace(everything.blocks[0], attention=Attention(heads=(0,))), *everything.blocks[1:])
    with pytest.raises(spvit.ArchitectureError, match="block 0: the attention of timm SwinTransformer hosts cannot be"):
        spvit.prune(host, Architecture(blocks))
