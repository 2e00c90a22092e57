"""What is Swin's own: windows, shifts, padding and stages, while searching and in the pruned network."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reference
import spvit
from spvit.architecture import Attention, dense
from spvit.cli.main import main
from spvit.cost import count_macs, count_params
from spvit.errors import GridError, UnsupportedHostError
from spvit.hosts.grid import Grid
from spvit.hosts.timm_swin import WindowedGrid
from spvit.replacements.costs import network_costs
from spvit.search.network import gated_layers
from tiny import (
    FAMILY_OF,
    MIXED,
    assert_close,
    choose,
    ffn_widths,
    images,
    logits,
    make_host,
    make_net,
    randomise,
    with_kinds,
)

timm = pytest.importorskip("timm")

SWINS = [name for name, family in FAMILY_OF.items() if family == "timm_swin"]


def blocks_of(net: nn.Module) -> list[Any]:
    """Return the blocks of all stages."""
    return [block for stage in net.layers for block in stage.blocks]


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
    assert isinstance(skip.norm1, nn.Identity)
    assert not [*skip.attn.parameters(), *skip.norm1.parameters(), *skip.norm1.state_dict()]
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


def test_costs_are_the_formulas_of_the_method() -> None:
    host = make_host("swin", torch.float32)
    costs = network_costs(host)["macs"]
    for block, n, d, e in zip(costs.blocks, (256, 256, 64, 64), (24, 24, 48, 48), (8, 8, 12, 12)):
        assert block.attention(Attention()) == 4 * n * d**2 + 2 * d * n * 16
        assert (block.kinds["conv3"].whole, block.kinds["conv1"].whole) == (10 * d * e * n, 2 * d * e * n)
        assert block.unit == 2 * n * d
    merging = 64 * (4 * 24) * 48
    assert costs.fixed == 256 * 12 * 24 + merging + 48 * 7


@pytest.mark.parametrize("kinds", [MIXED, ("skip", "conv3", "msa", "conv3")])
@pytest.mark.parametrize("size", [(24, 40), (30, 34), (32, 32)])
def test_costs_follow_the_input_size(size: tuple[int, int], kinds: tuple[str, ...]) -> None:
    host = make_host("swin", torch.float32)
    host.set_input_size(size)
    costs = network_costs(host)
    architecture = with_kinds(dense(ffn_widths(host)), *kinds)
    small = spvit.fold(spvit.prune(host, architecture))
    x = images(host, batch=1)
    assert x.shape[2:] == size
    assert costs["macs"].of(architecture) == count_macs(small, lambda twin: twin(x.to("meta")))
    assert costs["params"].of(architecture) == count_params(small)
    net = choose(randomise(spvit.make_searchable(host), seed=1), kinds)
    assert_close(logits(spvit.prune(host, spvit.decide(net), weights=net), x), logits(net, x))


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


@pytest.mark.slow
def test_a_swin_is_compressed_and_profiled_from_the_command_line(capsys: Any, tmp_path: Path) -> None:
    small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2]}
    model = ["--model", "swin_tiny_patch4_window7_224", "--model_args", json.dumps({**small, "window_size": 2})]
    model += ["--pretrained", "false"]
    images = {"batch_size": 512, "mean": [0.5], "std": [0.5], "crop": 1.0, "flip": 0.0}
    shared = [*model, "--data", "digits", "--images", json.dumps(images), "--macs", "60%"]
    epochs = [f"--{phase}.epochs=1" for phase in ("dense", "search", "finetune")]
    assert main(["compress", *shared, *epochs, "--output", str(tmp_path / "run")]) == 0
    loaded = spvit.load(tmp_path / "run")
    assert type(loaded) is timm.models.SwinTransformer
    assert loaded(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert main(["profile", "--model", str(tmp_path / "run")]) == 0
    assert main(["profile", *model]) == 0
    assert "share" in capsys.readouterr().out


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


@pytest.mark.parametrize("name", SWINS)
def test_narrow_attention_of_full_rank_is_the_host_and_a_narrower_one_is_repaired(name: str) -> None:
    host = make_host(name)
    whole, sites = dense(ffn_widths(host)), spvit.Host.of(host).blocks

    def narrow(kept: list[Attention], **options: Any) -> nn.Module:
        blocks = (replace(block, attention=own) for block, own in zip(whole.blocks, kept))
        return spvit.prune(host, replace(whole, blocks=tuple(blocks)), **options)

    x, unseen = images(host), images(host, 8, seed=9)
    full = [Attention(heads=tuple(range(block.attention.heads))) for block in sites]
    for found in (narrow(full), narrow(full, repair=images(host, 16, seed=1))):
        assert (logits(found, x) - logits(host, x)).abs().max() <= 1e-9 * logits(host, x).abs().max()
    small = [Attention(heads=(0, 2), value_rank=4)] * 4
    cut, repaired = (narrow(small, repair=some) for some in (None, images(host, 32, seed=1)))
    errors = [(logits(net, unseen) - logits(host, unseen)).square().mean() for net in (cut, repaired)]
    assert 0 < errors[1] < errors[0]
    with pytest.raises(GridError, match=r"windows of \d+ tokens are asked of narrow attention with a bias for \d+;"):
        blocks_of(cut)[0].attn.set_window_size((9, 9))


def test_a_map_that_timm_miscounts_is_refused() -> None:
    host = make_host("swin_padded")
    host.layers[1].output_resolution = (7, 8)  # as timm before 1.0.31 halves 15 x 17
    with pytest.raises(UnsupportedHostError, match=r"layers\.1 gets a map of \(8, 9\), but timm before"):
        spvit.cost(host)
