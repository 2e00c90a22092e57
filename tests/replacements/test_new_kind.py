"""A new kind of replacement is one file (average_tokens.py) and one line of the registry; all verbs then know it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import spvit
from spvit.architecture import FFN, KINDS, Architecture, Attention, Block
from spvit.errors import ArchitectureError
from tiny import ONE_A_FAMILY, assert_close, assert_differ, count_macs, ffn_widths, images, logits, make_host, paths_of


@pytest.fixture(autouse=True)
def _average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "average", "average_tokens:REPLACEMENT")


def averaging(host: nn.Module) -> Architecture:
    """Return an architecture with the new kind in two blocks."""
    kinds = ("average", "msa", "average", "conv1")
    blocks = (
        Block(Attention(kind), FFN(width, tuple(range(0, width, 2)))) for kind, width in zip(kinds, ffn_widths(host))
    )
    return Architecture(tuple(blocks), "linear", "mean")


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_it_is_pruned_repaired_folded_saved_and_priced(name: str, tmp_path: Path) -> None:
    host = make_host(name)
    architecture = averaging(host)
    assert Architecture.from_json(architecture.to_json()) == architecture
    x, unseen = images(host, 32), images(host, 8, seed=1)
    expected = logits(host, unseen)
    cut, repaired = (spvit.prune(host, architecture, repair=repair) for repair in (None, x))
    assert type(repaired.get_submodule(paths_of(host)[0].attention)).__name__ == "Average"
    errors = [(logits(model, unseen) - expected).square().mean() for model in (repaired, cut)]
    assert errors[0] < errors[1]
    assert_differ(logits(repaired, unseen), expected)
    folded = spvit.fold(repaired)
    for twin in (folded, copy.deepcopy(folded), spvit.load(spvit.save(folded, tmp_path))):
        assert_close(logits(twin, unseen), logits(repaired, unseen))
    params = sum(parameter.numel() for parameter in folded.parameters())
    assert spvit.cost(host, architecture) == {"macs": count_macs(folded, unseen[:1]), "params": params}


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_it_is_scored_and_chosen_where_it_serves(name: str) -> None:
    host = make_host(name)
    x = images(host, 24)
    scores = spvit.score(host, x)
    for block in scores.blocks:
        candidates = dict(block.attention)
        assert {"conv3", "conv1", "skip", "average"} <= {kept.kind for kept in candidates}
        assert candidates[Attention("average")] > 0
    # Where it is as good as attention and costs next to nothing, it is taken.
    serving = replace(
        scores,
        blocks=tuple(
            replace(
                block,
                attention=tuple((kept, 1e-9 if kept.kind == "average" else value) for kept, value in block.attention),
            )
            for block in scores.blocks
        ),
    )
    architecture = spvit.decide(host, macs="70%", scores=serving)
    assert architecture.kinds().count("average") >= 2
    assert 0.995 * 0.7 <= spvit.cost(host, architecture)["macs"] / spvit.cost(host)["macs"] <= 0.7
    assert Architecture.from_json(architecture.to_json()) == architecture
    forbidden = spvit.Constraints(forbid="average")
    assert "average" not in spvit.decide(host, macs="70%", scores=serving, constraints=forbidden).kinds()
    assert logits(spvit.prune(host, architecture, repair=x), x).isfinite().all()
    assert architecture == spvit.decide(host, macs="70%", scores=serving)


def test_searches_go_on_without_it() -> None:
    host = make_host("class_token")
    net = spvit.make_searchable(host)
    assert spvit.BudgetLoss(net, macs="50%").expected_cost() == spvit.cost(host)["macs"]
    architecture = averaging(host)
    pruned = spvit.prune(host, architecture, weights=net)
    assert_close(logits(pruned, images(host)), logits(spvit.prune(host, architecture), images(host)))


def test_without_its_line_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    text = averaging(make_host("class_token")).to_json()
    monkeypatch.delitem(KINDS, "average")
    with pytest.raises(ArchitectureError, match="attention kind 'average' is unknown, expected one of msa, "):
        Architecture.from_json(text)
