"""Scores of candidates: what is measured is what pruning to that candidate alone does; the rest is interpolated."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from spvit.repair.errors import Missed
from spvit.hosts.walk import Layer, block_inputs
from spvit.repair.scores import (
    FITTING,
    FLOOR,
    MEASURED_SHARES,
    MEASURING,
    BlockScores,
    Head,
    _by_errors,
    _interpolated_widths,
    _measured,
    _on_lines,
    _parts,
    _thinned,
    _with_all_ranks,
    score,
)
from torch import Tensor, nn
from torch.nn import functional as F

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block, dense
from spvit.errors import CalibrationError
from spvit.hosts.host import Host
from spvit.repair.repair import PREFIX_RULE, SKIP_RULE
from tiny import ALIKE, assert_close, images, logits, make_host

WIDTH = 72
CONVOLUTIONS = [Attention("conv3"), Attention("conv1"), Attention("skip")]


def scored(host: nn.Module, multiple: int = 4, count: int = 24) -> tuple[BlockScores, ...]:
    return score(host, family_of(host), images(host, count), multiple)


def divergence(host: nn.Module, index: int, kept: Block, x: Tensor) -> float:
    """Prune a host to one candidate alone, repaired on every other image, and compare outputs on the rest."""
    blocks = list(dense([WIDTH] * 4).blocks)
    blocks[index] = kept
    model = spvit.prune(host, Architecture(tuple(blocks), PREFIX_RULE, SKIP_RULE), repair=x[::2])
    wanted, found = (F.softmax(logits(net, x[1::2]), dim=1) for net in (host, model))
    return float((wanted * (wanted / found).log()).sum() / len(wanted))


@pytest.mark.parametrize("name", ["huggingface_options", "average_pooling"])
def test_measured_scores_are_what_pruning_to_one_candidate_does(name: str) -> None:
    host = make_host(name)
    x = images(host, 24)
    head_width = Host.of(host).blocks[0].attention.head_width
    ranks = (head_width // 4, head_width // 2)
    measured = [Attention(**{name: rank}) for name in ("query_key_rank", "value_rank") for rank in ranks]
    for index, found in enumerate(scored(host, multiple=head_width // 4)):
        candidates = dict(found.attention)
        fewer_heads = [kept for kept in candidates if kept == Attention(heads=kept.heads) and kept.narrowed()]
        assert sorted(len(kept.heads or ()) for kept in fewer_heads) == [1, 2]
        one = min(fewer_heads, key=lambda kept: len(kept.heads or ()))
        for kept in (*CONVOLUTIONS, *measured, one):
            block = Block(kept, FFN(WIDTH, tuple(range(WIDTH))))
            assert candidates[kept] == pytest.approx(divergence(host, index, block, x), rel=1e-5)
        expected = 0.0
        for share in reversed(MEASURED_SHARES):
            units = tuple(sorted(found.ranking.units[: round(WIDTH * share)]))
            # Fewer units are never taken to be better, which chance may say of so few images.
            expected = max(expected, divergence(host, index, Block(Attention(), FFN(WIDTH, units)), x))
            assert found.ffn[len(units)] == pytest.approx(expected, rel=1e-5)


def test_scores_do_not_depend_on_flags_or_batches_and_leave_the_host_alone() -> None:
    host = make_host("class_token")
    expected = scored(host)
    before = copy.deepcopy(host.state_dict())
    host.train()
    host.blocks[1].eval()
    for module in host.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    steps: list[tuple[int, int]] = []
    batches = images(host, 24).split(1)
    found = score(host, family_of(host), batches, 4, lambda done, blocks: steps.append((done, blocks)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for own, other in zip(found, expected):
        assert own.ranking.units == other.ranking.units
        assert own.ffn == pytest.approx(other.ffn, rel=1e-6)
        assert [value for _, value in own.attention] == pytest.approx([value for _, value in other.attention], rel=1e-6)
    assert [module.training for module in host.blocks] == [True, False, True, True]
    assert all(torch.equal(host.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ALIKE)
def test_the_head_is_the_host_behind_its_last_block(name: str) -> None:
    host = make_host(name)
    x = images(host, 3)
    blocks = Host.of(host).blocks
    outputs: list[Tensor] = []
    handle = host.get_submodule(blocks[-1].path).register_forward_hook(
        lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    expected = logits(host, x)
    handle.remove()
    with torch.no_grad():
        assert_close(Head(host, blocks, images(host, 1, seed=4))(outputs[0]), expected)


@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (2, 3, 2), (3, 1, 1, 2)])
def test_every_other_of_few_images_measures(sizes: tuple[int, ...]) -> None:
    x = torch.arange(7)[:, None]
    fitting, measuring = _parts(list(x.split(list(sizes))), 17)
    assert torch.cat(fitting).flatten().tolist() == [0, 1, 3, 5]
    assert torch.cat(measuring).flatten().tolist() == [2, 4, 6]
    assert len(fitting) == len(measuring) == 1  # nothing is left of small batches


@pytest.mark.parametrize(
    ("count", "tokens", "measure", "fit"),
    [
        (300, 3136, MEASURING[0], 300 - MEASURING[0]),
        (10 * FITTING[0], 3136, MEASURING[0], FITTING[0]),
        (5000, 50, MEASURING[1] // 50, FITTING[1] // 50),  # small images are cheap, so more of them count
        (600, 50, 300, 300),
    ],
)
def test_of_many_images_some_measure_and_others_fit_from_all_over_them(
    count: int, tokens: int, measure: int, fit: int
) -> None:
    fitting, measuring = (torch.cat(part) for part in _parts(list(torch.arange(count).split(64)), tokens))
    assert len(fitting) == fit
    assert len(measuring) == measure
    assert not set(fitting.tolist()) & set(measuring.tolist())
    for part in (fitting, measuring):
        gaps = part.diff(prepend=torch.tensor([0]), append=torch.tensor([count]))
        assert gaps[1:-1].min() > 0
        assert gaps.max() <= 2 * count / len(part)


def test_scores_that_cannot_be_had_are_refused() -> None:
    host = make_host("class_token").train()
    with pytest.raises(CalibrationError, match="one calibration image is too few to fit and measure; give a few hund"):
        scored(host, count=1)
    with pytest.raises(CalibrationError, match="16 calibration tokens are too few for a layer of 216 inputs"):
        scored(host, count=2)
    with pytest.raises(CalibrationError, match=r"calibration images are \[3, 64, 32\], expected"):
        score(host, family_of(host), images(host, 4)[..., :32], 4)
    broken = copy.deepcopy(host)
    broken.head.weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="the model's outputs are not finite with a candidate of block 0; check"):
        scored(broken)
    assert host.training


def test_a_better_candidate_scores_better() -> None:
    host = make_host("class_token")
    with torch.no_grad():
        host.blocks[2].attn.proj.weight.mul_(1e-3)  # this layer adds next to nothing that varies
        host.blocks[1].mlp.fc2.weight[:, 40:].zero_()  # these units are not used
    found = scored(host)
    skips = [dict(block.attention)[Attention("skip")] for block in found]
    assert min(skips) == skips[2]
    assert skips[2] < 1e-3 * min(skips[:2])
    assert set(found[1].ranking.units[:40]) == set(range(40))
    assert found[1].ffn[40] < 10 * FLOOR
    assert found[1].ffn[39] > 1e3 * FLOOR


@pytest.mark.parametrize(
    ("x", "expected"), [(1.0, 10.0), (2.0, 20.0), (4.0, 0.0), (1.5, 15.0), (3.0, 10.0), (0.0, 0.0), (5.0, -10.0)]
)
def test_lines_pass_through_their_points_and_go_on(x: float, expected: float) -> None:
    assert _on_lines(x, [1.0, 2.0, 4.0], [10.0, 20.0, 0.0]) == pytest.approx(expected)
    assert _on_lines(x, [7.0], [3.0]) == x - 4.0


def test_a_layer_that_gives_almost_nothing_is_scored() -> None:
    host = make_host("average_pooling")
    with torch.no_grad():
        for parameter in host.blocks[0].mlp.fc2.parameters():
            parameter.mul_(1e-7)
    architecture = spvit.decide(host, macs="60%", calibration=images(host, 64))
    assert len(architecture.blocks[0].ffn.units) < len(architecture.blocks[1].ffn.units)


def test_ranks_between_are_on_lines_of_the_logarithm() -> None:
    known = {Attention.narrow(8): 1e-2, Attention(value_rank=8): 5e-3, Attention.narrow(24): 1e-4}
    found = dict(_with_all_ranks(known, range(8, 32, 8)))
    assert found.pop(Attention.narrow(16)) == pytest.approx(1e-3)
    assert found == known
    assert _with_all_ranks({}, range(8, 32, 8)) == []


def test_errors_of_queries_and_of_values_tell_their_own_parts() -> None:
    errors = {
        Attention(query_key_rank=4): Missed(2.0, 0.0),
        Attention(value_rank=4): Missed(0.0, 2.0),
        Attention(value_rank=8): Missed(0.0, 1.0),
        Attention(heads=(0,), query_key_rank=4): Missed(2.0, 4.0),
        Attention.narrow(8): Missed(0.5, 1.0),
    }
    measured = {Attention(query_key_rank=4): 0.8, Attention(value_rank=4): 0.04, Attention(value_rank=8): 0.01}
    found = _by_errors(measured, errors)
    assert {kept: found[kept] for kept in measured} == pytest.approx(measured)
    assert found[Attention(heads=(0,), query_key_rank=4)] == pytest.approx(0.8 + 0.16)
    assert found[Attention.narrow(8)] == pytest.approx(0.2 + 0.01)
    assert _by_errors({}, {}) == {}


def test_errors_are_taken_on_images_from_all_over() -> None:
    host = make_host("class_token")
    family = family_of(host)
    sites = family.blocks(host)[0]
    with torch.no_grad():
        inputs = block_inputs(host, sites, images(host, 24).split(10))
        layer = Layer(host, host, family, sites, inputs, inputs).knowing(sites.attention.path)
        thin = _thinned(layer, 8 * 17)  # 17 tokens an image
        assert [len(x) for x in thin.dense_inputs] == [4, 4, 2]
        assert all(torch.equal(a, b[::3]) for a, b in zip(thin.dense_inputs, inputs, strict=True))
        outputs = [list(some.wanted(sites.attention.path)) for some in (thin, layer)]
        assert all(torch.equal(a, b[::3]) for a, b in zip(*outputs, strict=True))
        assert [len(x) for x in _thinned(layer, 10**6).dense_inputs] == [10, 10, 4]


def test_what_is_measured_is_narrower_in_one_way_only() -> None:
    ranks = (8, 16, 24, None)
    heads = ((5,), (2, 5), (0, 2, 5), None)
    errors = {
        Attention("msa", kept, query, value): Missed(0.0, 0.0)
        for kept, query, value in itertools.product(heads, ranks, ranks)
    }
    del errors[Attention()]
    assert _measured(errors, 32) == [
        Attention(query_key_rank=8),
        Attention(query_key_rank=16),
        Attention(value_rank=8),
        Attention(value_rank=16),
        Attention(heads=(2, 5)),
    ]
    assert _measured({}, 32) == []


def test_widths_between_follow_the_error_after_repair() -> None:
    errors = (8.0, 4.0, 2.0, 1.0, 0.5, 0.0)
    found = _interpolated_widths([(1, 0.4), (3, 0.1)], errors)
    assert found[:5] == pytest.approx((0.8, 0.4, 0.2, 0.1, 0.05))
    assert found[5] == 0
    found = _interpolated_widths([(1, 0.1), (3, 0.4)], errors)  # noise says that fewer units are better
    assert all(a > b for a, b in itertools.pairwise(found))
    assert found[:5] == pytest.approx((0.4,) * 5)
    dead = _interpolated_widths([(1, 0.1)], (1.0, 0.5, 0.0, 0.0))
    assert dead[1] == pytest.approx(0.1)
    assert 0 < dead[2] < 2 * FLOOR
    assert math.isclose(dead[3], 0)
    single = _interpolated_widths([], (1.0, 0.0))  # a single unit: no width in between to measure
    assert len(single) == 2
    assert single[0] > single[1] == 0
