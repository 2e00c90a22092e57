"""The table of costs that replacements fill: formulas of the method, and every rule of an architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import spvit
from spvit.architecture import FFN, PREFIX_RULES, REPAIRED, SKIP_RULES, Architecture, Attention, Block
from spvit.cost import AttentionCost, BlockCost, count_macs, count_params
from spvit.replacements.costs import network_costs
from tiny import MIXED, images, make_host

UNITS = {"few": (0, 5, 70), "some": tuple(range(1, 72, 2)), "none": (), "all": tuple(range(72))}


def _architecture(
    kinds: tuple[str, ...], units: tuple[tuple[int, ...], ...], widths: tuple[int, ...] = (72,) * 4
) -> Architecture:
    ffns = [FFN(width, kept if len(kept) < 72 else tuple(range(width))) for kept, width in zip(units, widths)]
    return Architecture(tuple(Block(Attention(kind), ffn) for kind, ffn in zip(kinds, ffns)))


def test_predicted_params_hold_under_the_published_skip_rule() -> None:
    host = make_host("class_token", torch.float32)
    architecture = replace(_architecture(MIXED, tuple(UNITS.values())), skip_rule="normalised_input")
    small = spvit.fold(spvit.prune(host, architecture))
    assert network_costs(host)["params"].of(architecture) == count_params(small)


@pytest.mark.parametrize("prefix_rule", PREFIX_RULES)
@pytest.mark.parametrize("skip_rule", SKIP_RULES)
@pytest.mark.parametrize("name", ["registers", "average_pooling", "residual_post_norm"])
def test_predicted_costs_hold_under_every_rule(name: str, skip_rule: str, prefix_rule: str) -> None:
    host = make_host(name, torch.float32)
    kinds = ("skip", "conv1", "conv3", "skip")
    architecture = replace(_architecture(kinds, tuple(UNITS.values())), prefix_rule=prefix_rule, skip_rule=skip_rule)
    small = spvit.fold(spvit.prune(host, architecture))
    costs, x = network_costs(host), images(host, batch=1)
    assert costs["macs"].of(architecture) == count_macs(small, lambda twin: twin(x.to("meta")))
    assert costs["params"].of(architecture) == count_params(small)


def test_all_heads_and_dimensions_cost_as_much_as_the_whole_layer() -> None:
    host = make_host("huggingface_options", torch.float32)
    for cost in network_costs(host).values():
        for kept in (Attention(heads=(0, 1, 2)), Attention(query_key_rank=16, value_rank=16), Attention()):
            assert cost.blocks[0].attention(kept, REPAIRED) == cost.blocks[0].kinds["msa"].whole


def test_costs_are_the_formulas_of_the_method() -> None:
    host = make_host("class_token", torch.float32)
    costs = network_costs(host)["macs"]
    n, grid, d, e = 17, 16, 24, 8
    dimension = n * (2 * d + n)  # of one head: two projections, one of the two attention products
    linear = {"linear": 2 * d * e}
    kinds = {
        "msa": AttentionCost(4 * n * d**2 + 2 * d * n**2, dimension, dimension),
        "conv3": AttentionCost(10 * d * e * grid, rules=linear),
        "conv1": AttentionCost(2 * d * e * grid, rules=linear),
        "skip": AttentionCost(0),
    }
    block = BlockCost(kinds, unit=2 * n * d, units=72, heads=3, head_width=e)
    each = n * d + d + n  # for one class token: keys of all, its query, its logits
    alone = {"msa": AttentionCost(2 * d * each, each, each), "skip": AttentionCost(0)}
    last = replace(block, prefix_only=BlockCost(alone, unit=2 * d, units=72, heads=3, head_width=e))
    assert costs.blocks == (*(block,) * 3, last)
    assert costs.for_prefix().blocks == (*(block,) * 3, last.prefix_only)
    assert costs.fixed == grid * 768 * d + d * 7  # patch embedding and classifier
