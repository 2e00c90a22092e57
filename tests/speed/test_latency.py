"""Latency budgets, with MACs in place of time: what is measured, what lands, and what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import spvit
from command import time_by_macs
from spvit.architecture import Architecture
from spvit.budget import Budget
from spvit.errors import BudgetError, CalibrationError
from spvit.speed.latency import LatencyTable, measure
from tiny import images, make_host

SCORED: dict[str, tuple[Any, spvit.Scores]] = {}


def scored(name: str) -> tuple[Any, spvit.Scores]:
    """Return a micro host and its scores, made once."""
    if name not in SCORED:
        host = make_host(name)
        SCORED[name] = host, spvit.score(host, images(host, 24))
    return SCORED[name]


def time_of(host: Any, architecture: Architecture | None = None, power: float = 0.8) -> float:
    """Return what the clock of these tests says, in milliseconds for one image."""
    return 1e-3 * spvit.cost(host, architecture)["macs"] ** power


@pytest.mark.parametrize(("name", "power"), [("class_token", 0.6), ("class_token", 1.0), ("swin", 0.8)])
def test_decisions_land_within_three_percent_of_a_latency_budget(monkeypatch, name: str, power: float) -> None:
    time_by_macs(monkeypatch, power=power)
    host, scores = scored(name)
    table, whole = measure(host), time_of(host, power=power)
    for share in (0.9, 0.75, 0.65):
        found = spvit.decide(host, latency=f"{100 * share:g}%", scores=scores, table=table)
        assert time_of(host, found, power) == pytest.approx(share * whole, rel=0.03)
        found = spvit.decide(host, latency=f"{share * whole:.9f}ms", scores=scores, table=table)
        assert time_of(host, found, power) == pytest.approx(share * whole, rel=0.03)
    assert len(table.networks) <= 8  # few are tried


def test_the_table_prices_what_was_measured_and_the_smallest_network(monkeypatch) -> None:
    turns = time_by_macs(monkeypatch, power=1.0)
    host, _ = scored("class_token")
    told: list[tuple[str, int, int]] = []
    host.train()
    table = measure(host, 2, report=lambda name, done, total, _: told.append((name, done, total)))
    assert host.training
    host.eval()
    assert told == [("latency", done, len(turns) - 1) for done in range(1, len(turns))]  # blocks alike: once
    macs, own = spvit.cost(host)["macs"], table.cost
    assert own.dense == pytest.approx(2e3 * macs, rel=0.01)
    assert own.metric == "latency"
    assert [block.dense for block in own.blocks] == pytest.approx([own.blocks[0].dense] * 4)
    counted = spvit.decide(host, macs="70%", scores=scored("class_token")[1])
    assert own.of(counted) == pytest.approx(2e3 * spvit.cost(host, counted)["macs"], rel=0.03)
    assert spvit.decide(host, latency="70%", scores=scored("class_token")[1], table=table).blocks[-1].tokens == "prefix"


def test_a_table_is_json_and_the_same_table_decides_the_same_without_measuring(monkeypatch, tmp_path: Path) -> None:
    time_by_macs(monkeypatch)
    host, scores = scored("class_token")
    table = measure(host)
    found = spvit.decide(host, latency="70%", scores=scores, table=table)
    table.save(tmp_path / "table.json")
    monkeypatch.setattr("spvit.speed.latency.measure_latencies", None)
    again = LatencyTable.load(tmp_path / "table.json")
    assert again == table
    assert spvit.decide(host, latency="70%", scores=scores, table=again) == found
    assert spvit.decide(make_host("class_token"), latency="70%", scores=scores, table=again) == found


def test_without_a_table_it_is_measured_at_batch_one(monkeypatch) -> None:
    turns = time_by_macs(monkeypatch)
    host, _ = scored("class_token")
    found = spvit.decide(host, latency="70%", calibration=images(host, 24))
    assert time_of(host, found) == pytest.approx(0.7 * time_of(host), rel=0.03)
    assert turns.count(2) >= 1


def test_noise_is_measured_again_and_then_said(monkeypatch, caplog) -> None:
    turns = time_by_macs(monkeypatch, spread=0.2)
    host, scores = scored("class_token")
    table = measure(host)
    calm = len(turns) / 3
    with caplog.at_level(logging.WARNING, "spvit"):
        spvit.decide(host, latency="70%", scores=scores, table=table)
    assert len(turns) == 3 * (calm + len(table.networks))
    assert "latency is noisy here" in caplog.text
    assert "(spread 20.0%); the budget is met no better than that" in caplog.text


def test_budgets_out_of_reach_name_the_smallest_measured_and_a_larger_batch(monkeypatch) -> None:
    time_by_macs(monkeypatch)
    host, scores = scored("class_token")
    table, x = measure(host), images(host, 24)
    advice = r"at batch 1 the smallest network, measured, takes \d+% of the dense one's .* ms; a larger batch "
    for given in ({"scores": scores}, {"calibration": x}):
        with pytest.raises(BudgetError, match=rf"cannot be reached.*the smallest reachable is .* ms .*; {advice}"):
            spvit.decide(host, latency="2%", table=table, **given)
    with pytest.raises(
        BudgetError, match=r"a budget of 9000 ms is above the dense model's .* ms; ask for 100% or less"
    ):
        spvit.decide(host, latency="9s", table=table, scores=scores)
    time_by_macs(monkeypatch, power=0.0)  # whatever is pruned takes as long
    with pytest.raises(BudgetError, match=r"the smallest network, measured, takes 100% of .*--latency-batch 64\)"):
        spvit.decide(host, latency="99%", scores=scores, table=measure(host, 8))


def test_what_was_measured_nearest_is_named_where_the_table_promised_more(monkeypatch) -> None:
    time_by_macs(monkeypatch)
    host, scores = scored("class_token")
    table = measure(host)
    time_by_macs(monkeypatch, power=0.2)
    with pytest.raises(
        BudgetError, match=r"no architecture was measured within 3% of .* ms \(70.0%\); the nearest tak"
    ):
        spvit.decide(host, latency="70%", scores=scores, table=table)


def test_tables_of_another_setting_are_refused(monkeypatch, tmp_path: Path) -> None:
    time_by_macs(monkeypatch)
    host, scores = scored("class_token")
    table = measure(host)
    for name, other in {"batch": 8, "dtype": "bfloat16", "threads": 99, "device": "abacus", "model": "another"}.items():
        changed = replace(table, setting={**table.setting, name: other})
        with pytest.raises(CalibrationError, match=f"the latency table is of {name} {other}, but here it is"):
            changed.check(spvit.Host.of(host), 1)
    with pytest.raises(CalibrationError, match="the latency table is of model .*; measure anew with"):
        spvit.decide(make_host("registers"), latency="70%", scores=scores, table=table)
    table.save(tmp_path / "table.json")
    data = json.loads((tmp_path / "table.json").read_text())
    for text in ("", "{}", "[]", json.dumps({**data, "version": 9}), json.dumps({**data, "cost": {}})):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(CalibrationError, match="table.json holds no latency table that can be read"):
            LatencyTable.load(tmp_path / "table.json")
    with pytest.raises(BudgetError, match="batch is 0, expected 1 image or more"):
        measure(host, 0)
    with pytest.raises(CalibrationError, match="on the meta device"):
        measure(make_host("class_token").to("meta"))


def test_gates_of_a_search_take_no_latency_budget() -> None:
    net = spvit.make_searchable(make_host("class_token"))
    with pytest.raises(
        BudgetError, match="a latency budget binds decisions by scores, but the gates of a search learn"
    ):
        spvit.decide(net, latency="60%")
    with pytest.raises(BudgetError, match="one of macs, params or latency, found macs and latency"):
        spvit.decide(net, latency="60%", macs="60%")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            "half",
            r"latency budget 'half' is malformed, expected a share like \"50%\", or a time like \"8ms\" or \"800us\"",
        ),
        ("8 minutes", "is malformed"),
        ("8M", "is malformed"),
        (True, "is malformed"),
        ("0%", "is out of range"),
        (0.5, r"latency budget 0\.5 has no unit; write \"0\.5ms\", or \"50%\" for a share"),
        ("8", r"latency budget 8 has no unit; write \"8ms\", or \"8%\" for a share"),
    ],
)
def test_malformed_latency_budgets_are_refused(value: Any, words: str) -> None:
    with pytest.raises(BudgetError, match=words.replace('\\"', '"')):
        Budget.parse(latency=value)


def test_times_are_nanoseconds() -> None:
    stated = {"8ms": 8_000_000, "0.5 s": 500_000_000, "800us": 800_000, "12ns": 12}
    for text, count in stated.items():
        budget = Budget.parse(latency=text)
        assert budget == Budget("latency", amount=count)
        assert Budget.parse(**budget.stated) == budget
    assert Budget.parse(**Budget.parse(latency="62.5%").stated) == Budget("latency", 0.625)


def test_real_times_of_a_pass_are_measured(monkeypatch) -> None:
    monkeypatch.setattr("spvit.speed.latency.SECONDS", 0.0)
    monkeypatch.setattr("spvit.speed.latency.CALM_TRIES", 1)
    host = make_host("average_pooling", torch.float32)
    table = measure(host)
    assert table.cost.dense >= table.cost.fixed >= 0
    assert table.timing(spvit.Host.of(host), spvit.decide(host, macs="70%", calibration=images(host, 24))).ns > 0
