"""What a changed layer is fitted to: the formulas, what they bring back, and that models are left as they were."""

from __future__ import annotations

import copy
import functools
import importlib
import operator
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import reference
import spvit
from own_models import EXPECTED, OWN
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.hosts.calling import inside
from spvit.hosts.host import Host
from spvit.hosts.walk import BlockPair, advance, first_inputs, keeping
from spvit.moments import Moments
from spvit.repair.repair import repair_block
from spvit.replacements import targets
from tiny import (
    assert_close,
    assert_differ,
    assert_untouched,
    everything_of,
    ffn_widths,
    images,
    logits,
    make_host,
    randomise,
)

SOME = ["class_token", "options", "residual_post_norm", "huggingface", "swin_non_square", "swin_padded"]
STREAMS = [name for name in SOME if name != "residual_post_norm"]
NARROW = Attention(heads=(0, 2), value_rank=3)
SHIFTED = 1  # every second block of Swin shifts its windows


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def pair_of(name: str, index: int = SHIFTED) -> BlockPair:
    """Return a block of a host beside one that has other attention and other inputs."""
    model = make_host(name)
    host = Host.of(model)
    dense_inputs = first_inputs(host, [images(model, 3), images(model, 2, seed=1)])
    for earlier in range(index):
        advance(host, earlier, dense_inputs)
    generator = torch.Generator().manual_seed(0)
    inputs = [x + 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in dense_inputs]
    pruned = copy.deepcopy(model)
    for parameter in pruned.get_submodule(host.blocks[index].attention.path).parameters():
        parameter.mul_(0.9)
    return BlockPair(pruned, host, index, inputs, dense_inputs)


def blocks(pair: BlockPair) -> tuple[nn.Module, nn.Module]:
    """Return the dense and the pruned block."""
    return pair.host.model.get_submodule(pair.sites.path), pair.model.get_submodule(pair.sites.path)


def behind_attention(block: nn.Module, x: Tensor) -> Tensor:
    """Return the stream behind a block's attention, [B, N, D], recorded on its way to the FFN."""
    found: list[Tensor] = []
    after = getattr(block, "norm2", None) or getattr(block, "layernorm_after", None)
    reading = block.get_submodule("mlp") if reference.post_norm(block) else after
    assert isinstance(reading, nn.Module)
    handle = reading.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    block(x)
    handle.remove()
    return found[0]


def answering(block: nn.Module, module: nn.Module, answer: Tensor, x: Tensor) -> Tensor:
    """Return a block's output when one of its modules answers something else."""

    def answer_other(module: nn.Module, args: object, output: object) -> object:
        return (answer, None) if isinstance(output, tuple) else answer

    handle = module.register_forward_hook(answer_other)
    out: Tensor = block(x)
    handle.remove()
    return out


def aims_of(pair: BlockPair, path: str) -> Iterator[targets.Target]:
    """Yield the targets of a layer."""
    if path == pair.sites.attention.path:
        return targets.attention_targets(pair)
    second: Any = pair.model.get_submodule(pair.sites.ffn.second)
    some = targets.ffn_targets(pair, range(pair.sites.ffn.units))
    return ((lacking + second(x), missing) for x, lacking, missing in some)


def all_of(own: Tensor, missing: Tensor | None) -> Tensor:
    """Return the target that brings the stream back."""
    return own if missing is None else own + missing


@pytest.mark.parametrize("name", SOME)
def test_targets_are_those_of_the_formulas(name: str) -> None:
    for index in (0, SHIFTED):
        pair = pair_of(name, index)
        dense, pruned = blocks(pair)
        grid = pair.sites.attention.layout
        attention = list(aims_of(pair, pair.sites.attention.path))
        ffn = list(aims_of(pair, pair.sites.ffn.second))
        assert len(attention) == len(ffn) == 2
        for number, (x, dense_x) in enumerate(zip(pair.inputs, pair.dense_inputs)):
            streams = behind_attention(dense, dense_x), behind_attention(pruned, x)
            for (own, missing), expected in (
                (attention[number], reference.attention_target(dense, dense_x, x, grid)),
                (ffn[number], reference.ffn_target(dense, *streams)),
            ):
                assert_close(own, expected[0])
                assert (missing is None) == (name == "residual_post_norm")
                if missing is not None:
                    assert_close(missing, expected[1])


def cut_pair(name: str, kept: Attention) -> tuple[BlockPair, Block, BlockPair]:
    """Return a block with such attention and a third of its units, what it keeps, and the block with all units."""
    if name.startswith("eva02"):
        small = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 3}
        model = timm.create_model("eva02_tiny_patch14_224", scale_mlp="normed" in name, **small)
        model = randomise(model).double().eval()
    else:
        model = randomise(OWN[name]()).double().eval() if name in OWN else make_host(name)
    own = torch.randn(4, *EXPECTED[name].image, dtype=torch.float64) if name in OWN else None
    host = Host.of(model if own is None else spvit.recognise(model, own))
    dense_inputs = first_inputs(host, list(torch.randn(5, *host.input_size, dtype=torch.float64).split(3)))
    for earlier in range(SHIFTED):
        advance(host, earlier, dense_inputs)
    inputs = [x + 0.3 * torch.randn_like(x) for x in dense_inputs]
    widths = [block.ffn.units for block in host.blocks]
    whole, some = ([Block(kept, FFN.whole(width)) for width in widths] for _ in range(2))
    some[SHIFTED] = Block(kept, FFN(widths[SHIFTED], tuple(range(1, widths[SHIFTED], 3))))
    pairs = [
        BlockPair(spvit.prune(host, Architecture(tuple(blocks), skip_rule="mean")), host, SHIFTED, inputs, dense_inputs)
        for blocks in (some, whole)
    ]
    return replace(pairs[0], attention=[]), some[SHIFTED], pairs[1]


@pytest.mark.parametrize("name", [*SOME, "packed_swiglu", "parallel", "eva02", "eva02 normed"])
def test_a_narrower_ffn_lacks_what_the_dense_one_answers_to_the_same_tokens_beyond_it(name: str) -> None:
    torch.manual_seed(0)
    pair, block, whole = cut_pair(name, Attention("conv1"))
    path = pair.sites.ffn.second
    assert (pair.sites.ffn.norm is not None) == (name == "eva02 normed")
    found = list(targets.ffn_targets(pair, block.ffn.units))
    second = pair.model.get_submodule(path)
    dense = replace(whole, host=pair.host.on(whole.model), dense_inputs=pair.inputs)
    for (x, lacking, _), arriving, own in zip(found, pair.arriving(path), dense.wanted(path), strict=True):
        assert_close(x, arriving)
        assert_close(lacking + second(x), own)
        assert_differ(second(x), own)


@pytest.mark.parametrize("kept", [Attention(), NARROW, Attention("conv3"), Attention("skip")], ids=str)
@pytest.mark.parametrize("name", ["class_token", "huggingface", "swin_padded", "parallel"])
def test_what_a_repair_keeps_of_attention_is_what_that_answers_once_fitted(name: str, kept: Attention) -> None:
    torch.manual_seed(0)
    pair, block, _ = cut_pair(name, kept)
    repair_block(pair, block)
    attention = inside(pair.model.get_submodule(pair.sites.attention.path))
    assert len(pair.attention or []) == len(pair.inputs)
    for number, x in enumerate(pair.inputs):
        expected = pair.block(x)
        with keeping(attention, pair.attention, number):
            assert_close(pair.block(x), expected)


@pytest.mark.parametrize("name", STREAMS)
def test_a_layer_that_meets_the_stream_target_brings_the_stream_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "SMALLEST", 0.0)
    pair = pair_of(name)
    dense, pruned = blocks(pair)
    attention, second = (pair.model.get_submodule(path) for path in (pair.sites.attention.path, pair.sites.ffn.second))
    corrected = zip(aims_of(pair, pair.sites.attention.path), aims_of(pair, pair.sites.ffn.second))
    for x, dense_x, both in zip(pair.inputs, pair.dense_inputs, corrected):
        after_attention, after_ffn = (all_of(*target) for target in both)
        wanted = dense(dense_x)
        assert_differ(pruned(x), wanted)
        assert_close(answering(pruned, attention, after_attention, x), wanted)  # the FFN behind it is whole
        assert_close(answering(pruned, second, after_ffn, x), wanted)


def test_scales_are_those_of_the_layers_and_small_ones_are_damped() -> None:
    pair = pair_of("options")
    dense, _ = blocks(pair)
    dense.ls1.gamma[:3] = torch.tensor([1e-9, -1e-9, 0.0])
    for name, path in (("ls1", pair.sites.attention.path), ("ls2", pair.sites.ffn.second)):
        gamma = dense.get_submodule(name).gamma
        damping = 1e-4 * gamma.square().mean()
        found = targets._scale(pair, path)
        assert found is not None
        assert_close(found, gamma / (gamma.square() + damping))
        large = gamma.square() > 100 * damping
        assert large.sum() > 10
        assert ((found * gamma - 1).abs()[large] < 0.01).all()
        assert found.abs().max() <= 0.5 / damping.sqrt()
    assert found.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["class_token", "options", "swin_padded", "huggingface"])
def test_scales_are_found_in_low_precision_and_beside_a_large_stream(name: str, dtype: torch.dtype) -> None:
    model = make_host(name, dtype)
    host = Host.of(model)
    inputs = [1000 * x for x in first_inputs(host, [images(model, 1)])]
    expected = pair_of(name, 0)
    for path in (host.blocks[0].attention.path, host.blocks[0].ffn.second):
        found, wanted = targets._scale(BlockPair(model, host, 0, inputs, inputs), path), targets._scale(expected, path)
        assert found is not None
        assert wanted is not None
        assert (found - wanted).abs().max() < 4 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("name", ["residual_post_norm", "options"])
def test_without_a_scale_a_layer_is_fitted_to_its_own_output(name: str) -> None:
    pair = pair_of(name)
    dense, pruned = blocks(pair)
    if name == "options":
        dense.ls1.gamma.zero_()
    assert targets._scale(pair, pair.sites.attention.path) is None
    for x, (found, missing) in zip(pair.inputs, aims_of(pair, pair.sites.attention.path)):
        assert missing is None
        assert_close(found, reference.attention_answer(dense, x))
    if name == "residual_post_norm":
        assert targets._scale(pair, pair.sites.ffn.second) is None
        for x, (found, missing) in zip(pair.inputs, aims_of(pair, pair.sites.ffn.second)):
            assert missing is None
            assert_close(found, reference.ffn_answer(dense, behind_attention(pruned, x)))


@pytest.mark.parametrize("name", SOME)
def test_where_nothing_was_pruned_before_layers_are_fitted_to_their_own_output(name: str) -> None:
    other = pair_of(name)
    same = copy.deepcopy(other.host.model)
    pair = BlockPair(same, other.host, SHIFTED, list(other.dense_inputs), other.dense_inputs)
    for path in (pair.sites.attention.path, pair.sites.ffn.second):
        for x, target in zip(pair.wanted(path), aims_of(pair, path)):
            assert_close(all_of(*target), x)
            assert path == pair.sites.ffn.second or target[1] is None


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError


@pytest.mark.parametrize("broken", [None, "dense norm1", "dense mlp.act", "pruned mlp.act"])
@pytest.mark.parametrize("name", ["options", "swin_padded"])
def test_hooks_are_gone_afterwards_even_when_a_module_raises(name: str, broken: str | None) -> None:
    pair = pair_of(name)
    if broken is not None:
        side, _, place = broken.partition(" ")
        parent, _, child = place.rpartition(".")
        setattr(blocks(pair)[side == "pruned"].get_submodule(parent), child, Broken())
    models = (pair.host.model, pair.model)
    before = [everything_of(model) for model in models]
    for path in (pair.sites.attention.path, pair.sites.ffn.second):
        reaches_it = broken is not None and (broken != "pruned mlp.act" or path == pair.sites.ffn.second)
        with pytest.raises(ZeroDivisionError) if reaches_it else nullcontext():
            list(aims_of(pair, path))
        for model, kept in zip(models, before):
            assert_untouched(model, kept)


def narrowed(host: nn.Module) -> Architecture:
    """Return an architecture with every second FFN unit, and attention of half the rank where it can be narrowed."""
    site = Host.of(host).blocks[0].attention
    ranks = (4 if narrows else None for narrows in (site.narrows_queries, site.narrows_values))
    kept = Attention("msa", None, *ranks)
    return Architecture(tuple(Block(kept, FFN(width, tuple(range(0, width, 2)))) for width in ffn_widths(host)))


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_what_is_mended_is_what_holds_on_the_other_half_of_the_images(biased: bool, windows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise, own = (torch.randn(9 * windows, 5, d, generator=generator, dtype=torch.float64) for d in (6, 4, 4))
    x = x + 2
    missing = x[..., :4] * torch.tensor([0.0, 0.1, 1, 100]) + torch.tensor([1, 1, 1, 100]) * noise
    pair = pair_of("class_token")
    pair = replace(pair, inputs=[torch.zeros(count, 1, 1) for count in (2, 4, 3)])
    gathered = targets.Gathered(pair)
    for batch in zip(*(part.split([2 * windows, 4 * windows, 3 * windows]) for part in (x, own, missing))):
        gathered.add(*batch)
    found, expected = gathered.moments(biased), Moments()
    expected.add(x, reference.mended_target(x, own, missing, biased, windows))
    for moment, wanted in zip(found.products(biased), expected.products(biased)):
        assert_close(moment, wanted)
    assert_close(found.mean_y, expected.mean_y)
    assert_differ(found.products(centred=True)[1], targets_of(x, own).products(centred=True)[1])
    [excess] = pair.excess
    assert excess > 0


def targets_of(x: Tensor, y: Tensor) -> Moments:
    moments = Moments()
    moments.add(x, y)
    return moments


def test_one_image_mends_no_more_than_means() -> None:
    pair = replace(pair_of("class_token"), inputs=[torch.zeros(1, 1, 1)])
    generator = torch.Generator().manual_seed(0)
    x, own, missing = (torch.randn(1, 50, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    gathered = targets.Gathered(pair)
    gathered.add(x, own, missing)
    found, expected = gathered.moments(True), targets_of(x, own + missing.mean(1, keepdim=True))
    assert_close(found.products(centred=True)[1], expected.products(centred=True)[1])
    assert_close(found.mean_y, expected.mean_y)


def half_of_it(self: Any, biased: bool) -> Moments:
    """Return the moments of own and half of what is missing, whatever the images say."""
    both = functools.reduce(operator.add, self._halves)
    if self._squares is None:
        return both
    width = len(self._squares)
    half = Moments(both)
    half.count, half._squares, half.tokens = both.count, both._squares, both.tokens
    half._origin_y = both._origin_y[:width] + both._origin_y[width:] / 2
    sum_x, sum_y, second, cross = both._sums
    half._sums = [sum_x, sum_y[:width] + sum_y[width:] / 2, second, cross[:, :width] + cross[:, width:] / 2]
    return half


@pytest.mark.parametrize(
    "name", ["class_token", "options", "huggingface", pytest.param("swin_padded", marks=pytest.mark.slow)]
)
def test_the_repaired_network_is_nearer_to_the_dense_one_on_new_images(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host(name)
    calibration, new = images(host, 256), images(host, 64, seed=1)

    def error() -> float:
        found = logits(spvit.prune(host, narrowed(host), repair=calibration), new)
        return float((found - logits(host, new)).square().sum())

    own = error()
    with monkeypatch.context() as patch:
        patch.setattr(targets.Gathered, "moments", half_of_it)
        assert own < 1.02 * error()
    dense = lambda pair, path: ((answer, None) for answer in pair.wanted(path))  # noqa: E731
    ffn, narrow = (importlib.import_module(f"spvit.replacements.{kind}") for kind in ("ffn", "narrow"))
    monkeypatch.setattr(narrow, "attention_targets", lambda pair: dense(pair, pair.sites.attention.path))

    def of_dense(pair: BlockPair, kept: object) -> Iterator[tuple[Tensor, Tensor, None]]:
        path = pair.sites.ffn.second
        second = pair.model.get_submodule(path)
        return ((x, answer - second(x), None) for x, answer in zip(pair.arriving(path), pair.wanted(path)))

    monkeypatch.setattr(ffn, "ffn_targets", of_dense)
    assert own < 0.93 * error()


def test_more_images_are_asked_for_where_they_would_help(caplog: pytest.LogCaptureFixture) -> None:
    host = make_host("class_token")
    spvit.prune(host, narrowed(host), repair=images(host, 16))
    said = r"misses \d+ % more on held-out images .* the 16 views that it had are too few or too alike"
    assert re.search(said, caplog.text)
    caplog.clear()
    spvit.prune(host, narrowed(host), repair=images(host, 256))
    assert not caplog.text
