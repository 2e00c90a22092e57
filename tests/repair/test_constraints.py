"""What a decision leaves alone: places, kinds and widths, as data and at hosts, and decisions that keep to them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import cache

import pytest
import yaml

import spvit
from spvit.architecture import FFN, Architecture, Attention
from spvit.errors import BudgetError, CalibrationError, ConstraintError
from spvit.repair.constraints import Constraints
from spvit.replacements.costs import network_costs
from tiny import ONE_A_FAMILY, WIDTH, ffn_widths, images, make_host, paths_of


def kept_at(host: spvit.Host, **constraints: object) -> tuple[list[int], list[int]]:
    """Return the blocks whose attention stays whole, and those whose FFN does."""
    allowed = Constraints(**constraints).at(host)
    units = [block.ffn.units for block in host.blocks]
    attention = [index for index, own in enumerate(allowed) if own.whole]
    return attention, [index for index, own in enumerate(allowed) if own.least_units == units[index]]


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_places_are_indices_ranges_parts_and_names(name: str) -> None:
    host = spvit.Host.of(make_host(name))
    paths, everywhere = paths_of(host.model), [0, 1, 2, 3]
    ffn = paths[2].second.rpartition(".")[0]
    for places, attention, ffns in (
        (None, [], []),
        (0, [0], [0]),
        ((0, -1), [0, 3], [0, 3]),
        ("1-2", [1, 2], [1, 2]),
        ("-2--1", [2, 3], [2, 3]),
        ("0, -1", [0, 3], [0, 3]),
        (range(2), [0, 1], [0, 1]),
        ("attention", everywhere, []),
        ("ffn 0", [0], everywhere),
        (paths[1].block, [1], [1]),
        (f"{paths[1].block}.*", [1], [1]),
        (paths[2].attention, [2], []),
        ([ffn, 0], [0], [0, 2]),
        ("*.mlp", [], everywhere),
        (f"*.{paths[0].attention.rpartition('.')[2]}", everywhere, []),
        ("*", everywhere, everywhere),
    ):
        assert kept_at(host, keep=places) == (attention, ffns), places
        if places is not None:
            others = tuple([index for index in everywhere if index not in own] for own in (attention, ffns))
            assert kept_at(host, only=places) == others, places
    assert kept_at(host, keep=0, only="attention") == ([0], everywhere)
    assert kept_at(host, only=("0-1", paths[2].attention)) == ([3], [2, 3])


def test_kinds_are_forbidden_everywhere_or_somewhere() -> None:
    host = spvit.Host.of(make_host("class_token"))
    assert {own.forbidden for own in Constraints().at(host)} == {frozenset()}
    assert {own.forbidden for own in Constraints(forbid="skip conv3").at(host)} == {frozenset(("skip", "conv3"))}
    somewhere = Constraints(forbid=("skip:0-1", "narrow:blocks.1.attn", "conv1:-1"), keep="blocks.2").at(host)
    assert [set(own.forbidden) for own in somewhere] == [{"skip"}, {"skip", "narrow"}, set(), {"conv1"}]
    narrow, skip, conv1 = Attention.narrow(4), Attention("skip"), Attention("conv1")
    found = [[own.takes(kept) for kept in (Attention(), narrow, skip, conv1)] for own in somewhere]
    assert found == [
        [True, True, False, True], [True, False, False, True], [True, False, False, False], [True, True, True, False],
    ]  # fmt: skip


def test_smallest_widths_are_shares_or_numbers() -> None:
    host = spvit.Host.of(make_host("swin_padded"))
    widths = ffn_widths(host.model)
    assert len(set(widths)) == 2
    for width, expected in (
        ("25%", [round(0.25 * units) for units in widths]),
        (0.25, [round(0.25 * units) for units in widths]),
        ("100%", list(widths)),
        (17, [17] * 4),
        ("1", [1] * 4),
        (max(widths), list(widths)),
    ):
        assert [own.least_units for own in Constraints(smallest_width=width).at(host)] == expected, width
    with pytest.raises(ConstraintError, match=f"smallest_width is {max(widths) + 1}, but the FFNs of this SwinTr"):
        Constraints(smallest_width=max(widths) + 1).at(host)


def test_constraints_are_data() -> None:
    constraints = Constraints(keep=[0, "-1", "*.mlp"], forbid="skip, conv3:0-2", smallest_width="25%")
    assert constraints == Constraints(keep="0 -1 *.mlp", forbid=("skip", "conv3:0-2"), smallest_width="25%")
    assert constraints.keep == (0, -1, "*.mlp")
    assert Constraints(**json.loads(json.dumps(asdict(constraints)))) == constraints
    assert Constraints(**yaml.safe_load(yaml.safe_dump(asdict(constraints)))) == constraints
    assert list(constraints.given().values()) == ["keep 0, -1, *.mlp", "forbid skip, conv3:0-2", "smallest_width 25%"]
    assert Constraints().given() == {}


@pytest.mark.parametrize(
    ("words", "constraints"),
    [
        (r"keep 4: this VisionTransformer has blocks 0 to 3, or -4 to -1 from the end", {"keep": 4}),
        (r"keep -5: this VisionTransformer has blocks 0 to 3", {"keep": (0, -5)}),
        (r"only 2-1: this VisionTransformer has blocks 0 to 3", {"only": "2-1"}),
        (r"keep 2-4: this VisionTransformer has blocks 0 to 3", {"keep": "2-4"}),
        (
            r"keep 'blocks.1.atn' matches no block, attention layer or FFN of this VisionTransformer; did you mean "
            r"'blocks.1.attn'\?",
            {"keep": "blocks.1.atn"},
        ),
        (r"only 'attn' matches no .* did you mean 'attention'\?", {"only": "attn"}),
        (r"keep '\*.norm1' matches no", {"keep": ("*", "*.norm1")}),
        (r"keep: found 1.5, expected block indices or names", {"keep": 1.5}),
        (r"only: found True, expected block indices or names", {"only": (True,)}),
        (r"keep: found '', expected block indices or names", {"keep": ""}),
        (r"forbid 'conv2': expected a kind, narrow, conv3, conv1, skip; did you mean 'conv\d'\?", {"forbid": "conv2"}),
        (r"forbid 'msa': .*; the layer as it was cannot be forbidden", {"forbid": "msa"}),
        (r"forbid skip 9: this VisionTransformer has blocks 0 to 3", {"forbid": "skip:9"}),
        (r"forbid 'skip:\*.mlp': \*.mlp has no attention layer", {"forbid": "skip:*.mlp"}),
        (r"smallest_width is '0', expected a share of the units \(25%\) or a whole number", {"smallest_width": "0"}),
        (r"smallest_width is '101%', expected", {"smallest_width": "101%"}),
        (r"smallest_width is 2.5, expected", {"smallest_width": 2.5}),
        (r"smallest_width is 1.0, expected", {"smallest_width": 1.0}),
        (r"smallest_width is -8, expected", {"smallest_width": -8}),
        (r"smallest_width is 'half', expected", {"smallest_width": "half"}),
        (r"smallest_width is True, expected", {"smallest_width": True}),
        (r"smallest_width is 73, but the FFNs of this VisionTransformer have 72 units", {"smallest_width": 73}),
    ],
)
def test_what_is_malformed_or_not_there_is_refused(words: str, constraints: dict[str, object]) -> None:
    with pytest.raises(ConstraintError, match=words):
        Constraints(**constraints).at(spvit.Host.of(make_host("class_token")))


@cache
def scored(name: str) -> tuple[spvit.Host, spvit.Scores]:
    host = spvit.Host.of(make_host(name))
    return host, spvit.score(host, images(host.model, 24), multiple=4)


def decided(name: str, macs: str | int, **constraints: object) -> Architecture:
    host, scores = scored(name)
    return spvit.decide(host, macs=macs, scores=scores, constraints=Constraints(**constraints))


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_decisions_keep_to_their_constraints_and_budget(name: str) -> None:
    host, scores = scored(name)
    widths, dense = ffn_widths(host.model), network_costs(host)["macs"].dense
    free = spvit.decide(host, macs="75%", scores=scores)
    assert decided(name, "75%") == free
    for constraints in (
        {"keep": (0, -1)},
        {"forbid": ("skip", "conv1", "conv3")},
        {"forbid": ("narrow", "skip:-1")},
        {"smallest_width": "60%"},
        {"only": "0-2", "forbid": "conv3", "smallest_width": 9},
        {"keep": ("*.0.mlp", 3), "forbid": "skip:0"},
    ):
        found = decided(name, "75%", **constraints)
        assert 0.995 * 0.75 <= spvit.cost(host, found)["macs"] / dense <= 0.75
        for block, own, width in zip(found.blocks, Constraints(**constraints).at(host), widths):
            assert own.takes(block.attention)
            assert len(block.ffn.units) >= own.least_units
            assert own.least_units < width or block.ffn == FFN.whole(width)
    assert decided(name, "75%", keep=(0, -1)) != free


def test_only_one_part_changes() -> None:
    ffn, attention = (decided("class_token", "80%", only=part) for part in ("ffn", "attention"))
    assert {block.attention for block in ffn.blocks} == {Attention()}
    assert min(ffn.widths()) < WIDTH
    assert {block.ffn for block in attention.blocks} == {FFN.whole(WIDTH)}
    assert {block.attention for block in attention.blocks} != {Attention()}


def amount(error: pytest.ExceptionInfo[BudgetError]) -> int:
    return int(re.search(r"([\d,]+) macs\)", str(error.value))[1].replace(",", ""))


@pytest.mark.parametrize(
    ("constraints", "loosest"),
    [
        ({"only": "ffn", "smallest_width": "90%"}, "only|smallest_width"),
        ({"keep": (0, 1, 2), "smallest_width": 9}, "keep"),
        ({"forbid": ("skip", "conv1", "conv3", "narrow"), "keep": 0}, "forbid|keep"),
    ],
)
def test_budgets_out_of_reach_name_the_smallest_and_what_to_loosen(constraints, loosest: str) -> None:
    host, _ = scored("class_token")
    under = "; ".join(map(re.escape, Constraints(**constraints).given().values()))
    words = f"multiples of 1, under {under}: the smallest reachable is .* macs\\); loosen ({loosest}): without it "
    with pytest.raises(BudgetError, match=words) as error:
        decided("class_token", "45%", **constraints)
    found = decided("class_token", amount(error), **constraints)
    assert spvit.cost(host, found)["macs"] == amount(error)
    with pytest.raises(BudgetError, match="the smallest reachable"):
        decided("class_token", amount(error) - 1, **constraints)
    with pytest.raises(BudgetError, match=words) as before_scoring:
        spvit.decide(host, macs="45%", calibration=[], constraints=Constraints(**constraints))
    assert amount(before_scoring) == amount(error)


def test_keeping_everything_keeps_everything() -> None:
    assert decided("class_token", "100%", keep="*") == decided("class_token", "100%")
    with pytest.raises(BudgetError, match=r"\(100.0%, .*; loosen keep"):
        decided("class_token", "99%", keep="*")


def test_choices_too_coarse_for_a_budget_name_the_nearest() -> None:
    constraints = {"only": "attention", "forbid": "narrow", "keep_patches": True}
    with pytest.raises(
        BudgetError, match=r"within 0\.5% of .*; the nearest below is [\d,]+ macs, so ask for .*%$"
    ) as error:
        decided("class_token", "80%", **constraints)
    nearest, share = re.search(r"below is ([\d,]+) macs, so ask for (.*)$", str(error.value)).groups()
    host, _ = scored("class_token")
    assert spvit.cost(host, decided("class_token", share, **constraints))["macs"] == int(nearest.replace(",", ""))


def test_constraints_do_not_bind_gates() -> None:
    net = spvit.make_searchable(make_host("class_token"))
    with pytest.raises(ConstraintError, match=r"keep 0: constraints bind decisions by scores, but here the gates"):
        spvit.decide(net, macs="70%", constraints=Constraints(keep=0))
    assert spvit.decide(net, constraints=Constraints()) == spvit.decide(net)


def test_scores_of_another_model_are_refused_first() -> None:
    with pytest.raises(CalibrationError, match="of other weights"):
        spvit.decide(
            make_host("average_pooling"), macs="70%", scores=scored("class_token")[1], constraints=Constraints(keep=9)
        )
