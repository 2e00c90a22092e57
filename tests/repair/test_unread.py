"""Hosts behind whose last block the patch tokens are not read: found, decided, pruned and repaired for less."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spvit
from own_models import EXPECTED, OWN
from spvit.budget import human
from spvit.hosts.host import Host
from spvit.repair.constraints import Constraints
from spvit.repair.unread import patches_unread
from tiny import HOSTS, images, logits, make_host, randomise

READ = {
    "average_pooling", "registers", "rms_map_pool", "residual_post_norm", "tutorial", "pairs_simple", "segmenter",
    "backbone", "packed_keys_swiglu", "parallel_two_norms", "rope_argument", "relative_bias", "qk_norm",
}  # fmt: skip
"""Hosts that pool or answer their patch tokens; Swin does, too."""


@pytest.mark.parametrize("name", [*HOSTS, *OWN])
def test_what_is_read_is_found_by_changing_it(name: str) -> None:
    if name in HOSTS:
        host = Host.of(make_host(name, torch.float32))
    else:
        x = torch.randn(2, 3, *(8 * side for side in EXPECTED[name].grid))
        host = spvit.recognise(randomise(OWN[name]()).eval(), x)
    before = {key: value.clone() for key, value in host.model.state_dict().items()}
    objective = "logits" if host.family.classes(host.model) > 1 else "pooled"
    assert patches_unread(host, objective) == (name not in READ and not name.startswith("swin"))
    assert not patches_unread(host, "features")
    assert not patches_unread(host, lambda output: output)
    assert all(torch.equal(value, before[key]) for key, value in host.model.state_dict().items())


def test_half_precision_is_no_obstacle() -> None:
    assert patches_unread(Host.of(make_host("class_token", torch.bfloat16)), "auto")


def test_a_head_of_zeros_says_nothing() -> None:
    host = make_host("rms_map_pool")
    nn.init.zeros_(host.head.weight)
    assert not patches_unread(Host.of(host), "logits")


@pytest.mark.parametrize("name", ["class_token", "distilled", "huggingface"])
def test_a_decision_spends_what_is_freed_elsewhere(name: str) -> None:
    host, divergence = Host.of(make_host(name, torch.float32)), []
    x, held_out = images(host.model, 96), images(host.model, 64, seed=9)
    scores = spvit.score(host, x, multiple=4)
    for keep in (False, True):
        architecture = spvit.decide(host, macs="80%", scores=scores, constraints=Constraints(keep_patches=keep))
        assert architecture.blocks[-1].tokens == ("all" if keep else "prefix")
        share = spvit.cost(host, architecture)["macs"] / spvit.cost(host)["macs"]
        assert 0.995 * 0.8 <= share <= 0.8
        small = spvit.prune(host, architecture, repair=x)
        divergence.append(_divergence(logits(small, held_out), logits(host.model, held_out)))
    assert divergence[0] < divergence[1]


def _divergence(found: Tensor, dense: Tensor) -> float:
    pair = (found.log_softmax(1), dense.log_softmax(1))
    return float(nn.functional.kl_div(*pair, reduction="batchmean", log_target=True))


@pytest.mark.parametrize(
    ("budget", "constraints"),
    [
        ({"macs": "100%"}, {}),
        ({"params": "60%"}, {}),
        ({"macs": "60%"}, {"keep": -1}),
        ({"macs": "60%"}, {"keep_patches": True}),
    ],
)
def test_patch_tokens_stay(budget: dict[str, Any], constraints: dict[str, Any]) -> None:
    host = make_host("class_token", torch.float32)
    architecture = spvit.decide(host, calibration=images(host, 24), constraints=Constraints(**constraints), **budget)
    assert architecture.blocks[-1].tokens == "all"


def test_features_keep_their_patch_tokens() -> None:
    host = make_host("class_token", torch.float32)
    architecture = spvit.decide(host, macs="60%", calibration=images(host, 24), objective="features")
    assert architecture.blocks[-1].tokens == "all"


def test_a_smaller_budget_can_be_reached() -> None:
    host = make_host("class_token", torch.float32)
    x = images(host, 24)
    smallest = []
    for keep in (False, True):
        with pytest.raises(spvit.BudgetError, match="the smallest reachable is") as caught:
            spvit.decide(host, macs="40%", calibration=x, constraints=Constraints(keep_patches=keep))
        assert ("under keep_patches True" in str(caught.value)) == keep
        smallest.append(int(re.search(r"([\d,]+) macs\)", str(caught.value))[1].replace(",", "")))
    assert smallest[0] < smallest[1]
    assert f"without it {human(smallest[0])}" in str(caught.value)
    assert spvit.cost(host, spvit.decide(host, macs=smallest[0], calibration=x))["macs"] == smallest[0]
