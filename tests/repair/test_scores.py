"""Scores of candidates: what is measured is what pruning to that candidate alone does; the rest is interpolated."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spvit
from spvit.architecture import FFN, REPAIRED, Architecture, Attention, Block, dense
from spvit.errors import CalibrationError
from spvit.hosts.host import Host
from spvit.hosts.walk import tokens_of
from spvit.repair.gradients import gradients
from spvit.repair.interpolation import FLOOR
from spvit.repair.objective import Objective
from spvit.repair.scores import (
    FITTING,
    MEASURED_SHARES,
    MEASURING,
    BlockScores,
    Scores,
    score,
    split_images,
)
from tiny import ONE_A_FAMILY, images, logits, make_host, randomise

WIDTH = 72
CONVOLUTIONS = [Attention("conv3"), Attention("conv1"), Attention("skip")]


def scored(host: nn.Module, multiple: int = 4, count: int = 24) -> tuple[BlockScores, ...]:
    return score(host, images(host, count), multiple=multiple).blocks


def moved_by(host: nn.Module, index: int, kept: Block, x: Tensor) -> float:
    """Prune to one candidate, repaired on every other image; return how far outputs move along their gradients."""
    blocks = list(dense([WIDTH] * 4).blocks)
    blocks[index] = kept
    model = spvit.prune(host, Architecture(tuple(blocks), *REPAIRED), repair=x[::2]).eval()
    sites = Host.of(host).blocks[index]
    path = sites.ffn.second if kept.attention == Attention() else sites.attention.path
    answers: list[Tensor] = []
    for net in (model, host):
        handle = net.get_submodule(path).register_forward_hook(lambda module, args, out: answers.append(tokens_of(out)))
        logits(net, x[1::2])
        handle.remove()
    with torch.no_grad():
        objective = Objective.of("auto", Host.of(host))
        [gradient] = gradients(Host.of(host), objective, [x[1::2]])[path]
    return float((gradient * (answers[0] - answers[1]).flatten(1)).sum(2).square().sum())


@pytest.mark.parametrize("name", [pytest.param("huggingface_options", marks=pytest.mark.slow), "average_pooling"])
def test_measured_scores_are_what_pruning_to_one_candidate_does(name: str) -> None:
    host = make_host(name)
    x = images(host, 24)
    head_width = Host.of(host).blocks[0].attention.head_width
    for index, found in enumerate(scored(host, multiple=head_width // 2)):
        candidates = dict(found.attention)
        for kept in CONVOLUTIONS:
            block = Block(kept, FFN(WIDTH, tuple(range(WIDTH))))
            assert candidates[kept] == pytest.approx(moved_by(host, index, block, x), rel=1e-5)
        if index == 1:
            narrow = {kept: score for kept, score in candidates.items() if kept.narrowed()}
            moved = {kept: moved_by(host, index, Block(kept, FFN.whole(WIDTH)), x) for kept in narrow}
            assert sum(narrow[kept] == pytest.approx(moved[kept], rel=1e-5) for kept in narrow) >= 3
        least = 0.0
        for share in reversed(MEASURED_SHARES):
            units = tuple(sorted(found.ranking.units[: round(WIDTH * share)]))
            # Fewer units are never taken to be better, which chance may say of so few images.
            least = max(least, moved_by(host, index, Block(Attention(), FFN(WIDTH, units)), x))
            assert found.ffn[len(units)] == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("name", ["class_token", "average_pooling"])
def test_scores_are_near_the_divergence_of_outputs(name: str) -> None:
    host = make_host(name)
    x = images(host, 400)
    for index, found in enumerate(scored(host, count=400)):
        units = tuple(sorted(found.ranking.units[: WIDTH // 2]))
        blocks = list(dense([WIDTH] * 4).blocks)
        blocks[index] = Block(Attention(), FFN(WIDTH, units))
        model = spvit.prune(host, Architecture(tuple(blocks), *REPAIRED), repair=x[::2])
        wanted, other = (F.softmax(logits(net, x[1::2]), dim=1) for net in (host, model))
        divergence = float((wanted * (wanted / other).log()).sum() / len(wanted))
        # The repair also mends what whole FFNs behind can, which scores leave out.
        assert 0.8 * divergence <= found.ffn[len(units)] <= 2 * divergence


@pytest.mark.parametrize("name", ["swin_padded", "swin_always_partition"])
def test_what_gets_a_map_whole_is_measured_like_windows(name: str) -> None:
    model = make_host(name)
    x = images(model, 24)
    host = Host.of(model)
    sums: list[Tensor] = []  # of the residual stream and the layer's output, on the map
    with torch.no_grad():
        felt = gradients(host, Objective.of("auto", host), [x[1::2]])
    for index, found in enumerate(scored(model)):
        blocks = list(dense([block.ffn.units for block in host.blocks]).blocks)
        blocks[index] = replace(blocks[index], attention=Attention("conv1"))
        site = host.blocks[index].attention
        for net in (spvit.prune(model, Architecture(tuple(blocks), *REPAIRED), repair=x[::2]).eval(), model):
            norm = net.get_submodule(f"{host.blocks[index].path}.norm2")
            handle = norm.register_forward_pre_hook(lambda module, args: sums.append(args[0].flatten(1, -2)))
            logits(net, x[1::2])
            handle.remove()
        error = sums[-2] - sums[-1]
        found_there = felt[site.path][0]
        on_map = site.own_grid().gather(found_there.reshape(-1, site.keys, site.dim), 0)
        expected = float((on_map.unflatten(0, found_there.shape[:2]) * error).sum((2, 3)).square().sum())
        assert dict(found.attention)[Attention("conv1")] == pytest.approx(expected, rel=1e-5)


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
    found = score(host, batches, multiple=4, report=lambda _, done, blocks, __: steps.append((done, blocks))).blocks
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for own, other in zip(found, expected):
        assert own.ranking.units == other.ranking.units
        assert own.ffn == pytest.approx(other.ffn, rel=1e-6)
        assert [value for _, value in own.attention] == pytest.approx([value for _, value in other.attention], rel=1e-6)
    assert [module.training for module in host.blocks] == [True, False, True, True]
    assert all(torch.equal(host.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (2, 3, 2), (3, 1, 1, 2)])
def test_every_other_of_few_images_measures(sizes: tuple[int, ...]) -> None:
    x = torch.arange(7)[:, None]
    fitting, measuring = split_images(list(x.split(list(sizes))), 17)
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
    fitting, measuring = (torch.cat(part) for part in split_images(list(torch.arange(count).split(64)), tokens))
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
        score(host, images(host, 4)[..., :32])
    broken = copy.deepcopy(host)
    broken.head.weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="outputs, or their gradients, are not finite; check its weights"):
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


def test_a_layer_that_gives_almost_nothing_is_scored() -> None:
    host = make_host("average_pooling")
    with torch.no_grad():
        for parameter in host.blocks[0].mlp.fc2.parameters():
            parameter.mul_(1e-7)
    architecture = spvit.decide(host, macs="60%", calibration=images(host, 64))
    assert len(architecture.blocks[0].ffn.units) < len(architecture.blocks[1].ffn.units)


def test_scores_are_saved_and_loaded_as_data(tmp_path: Path) -> None:
    host = make_host("class_token")
    scores = score(host, images(host, 16))
    scores.save(tmp_path / "scores")
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == ["scores.json", "scores.safetensors"]
    assert len({path.stat().st_mode for path in (tmp_path / "scores").iterdir()}) == 1
    assert Scores.load(tmp_path / "scores") == scores
    with pytest.raises(
        CalibrationError, match=r"nothing holds no scores that can be read .*spvit\.score\(host, images\)"
    ):
        Scores.load(tmp_path / "nothing")
    path = tmp_path / "scores" / "scores.json"
    text = path.read_text()
    for damaged in ("{", "[]", text.replace("spvit-scores", "others"), text.replace('"conv3"', '"conv5"')):
        path.write_text(damaged)
        with pytest.raises(CalibrationError, match="holds no scores that can be read"):
            Scores.load(tmp_path / "scores")


def test_scores_of_other_weights_are_refused() -> None:
    host = make_host("class_token")
    scores = score(host, images(host, 16))
    other = randomise(copy.deepcopy(host), seed=1)
    with pytest.raises(CalibrationError, match="of other weights than this VisionTransformer has; score it again"):
        spvit.decide(other, macs="70%", scores=scores)
    assert spvit.decide(copy.deepcopy(host), macs="70%", scores=scores) == spvit.decide(host, macs="70%", scores=scores)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_scoring_that_was_cut_short_goes_on_to_the_same_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = make_host(name)
    x, finished = images(host, 24), {}
    whole = score(host, x)

    def cut(phase: str, done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(host, x, report=cut, finished=finished)
    assert list(finished) == [0, 1]
    calls, measured = [], spvit.repair.scores._score_ffn
    monkeypatch.setattr("spvit.repair.scores._score_ffn", lambda *given: calls.append(given) or measured(*given))
    assert score(host, x, finished=finished) == whole
    assert len(calls) == len(whole.blocks) - 2
