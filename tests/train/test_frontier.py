"""A frontier: one scoring, a model for each budget, and what happens to budgets and runs that end badly."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

import spvit
from command import measure_briefly, refused, run, time_by_macs
from spvit.errors import BudgetError, DataError, RunFolderError
from spvit.train.points import Frontier
from training import digits, micro_host, photographs, states_equal

SHORT = spvit.FrontierConfig(calibration_images=128, batches=(1,))


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_briefly(monkeypatch)


@pytest.fixture(name="dense", scope="module")
def _dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dense model of the digits."""
    images = digits()
    return spvit.save(micro_host(), tmp_path_factory.mktemp("host") / "dense", classes=images.classes,
                      preprocessing=images.preprocessing)  # fmt: skip


def command(dense: Path, out: Path, *more: str) -> list[str]:
    settings = ["--calibration-images", "120", "--images.batch-size", "60", "--batches", "1"]
    return ["frontier", str(dense), "--data", "digits", "--output", str(out), *settings, *more]


def test_every_budget_has_a_model_and_the_frontier_is_written_in_four_forms(
    capsys, dense: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    code, text, problems = run(capsys, *command(dense, out, "--budgets", "40%", "70%", "1%"))
    assert (code, problems) == (0, "")
    for said in ("70%: accuracy", "40%: accuracy", "1% is left out: a budget of", "speed-up over dense", 'load("'):
        assert " ".join(said.split()) in " ".join(text.split())
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "scores.json", "scores.safetensors", "frontier.json", "frontier.csv", "frontier.svg",
        "frontier.png", "70pct", "40pct", "report.html", "state",
    }  # fmt: skip
    data = json.loads((out / "frontier.json").read_text())
    assert (data["format"], data["metric"], data["images"], list(data["unreached"])) == (
        "spvit-frontier",
        "macs",
        360,
        ["1%"],
    )
    assert [(point["budget"], point["folder"]) for point in data["points"]] == [
        ("dense", None), ("70%", "70pct"), ("40%", "40pct")
    ]  # fmt: skip
    whole = data["points"][0]
    for point, share in zip(data["points"][1:], (0.7, 0.4)):
        model = spvit.load(out / point["folder"])
        record = spvit.surgery.pruned_record(model)
        assert (record.folded, record.architecture) == (
            True, spvit.Architecture.load(out / point["folder"] / "architecture.json")
        )  # fmt: skip
        assert point["macs"] == spvit.cost(micro_host(), record.architecture)["macs"]
        assert point["macs"] == pytest.approx(share * whole["macs"], rel=0.01)
        assert point["accuracy"] == spvit.describe(out / point["folder"]).metrics["accuracy"]
        assert (point["agreement"], [latency["batch"] for latency in point["latency"]]) == (None, [1])
    with (out / "frontier.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["latency_ms_batch_1"]) for row in rows] == [
        point["latency"][0]["latency_ms"] for point in data["points"]
    ]  # fmt: skip
    assert "dense" in (out / "frontier.svg").read_text()

    code, text, _ = run(capsys, "evaluate", "--model", str(out / "40pct"), "--data", "digits")
    assert f"accuracy {data['points'][2]['accuracy']:.2%}" in text
    words = ["compress", str(dense), "--macs", "50%", "--scores", str(out), "--output", str(tmp_path / "small")]
    words[1:2] = ["--model", str(dense)]
    more = ["--data", "digits", "--no-train", "--calibration-images", "120", "--repair-views", "1"]
    assert run(capsys, *words, *more)[0] == 0
    assert (tmp_path / "small" / "scores.json").read_bytes() == (out / "scores.json").read_bytes()


def test_a_killed_frontier_does_not_repeat_what_is_done(monkeypatch, tmp_path: Path) -> None:
    host, images, out = micro_host(), digits(), tmp_path / "run"
    calls: list[str] = []
    from spvit.train import compress as compressing
    from spvit.train import frontier as made

    prune, score = made.prune_each, compressing.score

    def dying(*args: object, **named: object) -> list[torch.nn.Module]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append("prune")
        return prune(*args, **named)

    monkeypatch.setattr(made, "MEMORY", 0)  # which holds one budget at a time
    monkeypatch.setattr(made, "prune_each", dying)
    monkeypatch.setattr(compressing, "score", lambda *args, **named: calls.append("score") or score(*args, **named))
    with pytest.raises(KeyboardInterrupt):
        spvit.frontier(host, images, ("70%", "40%"), output=out, config=SHORT)
    assert calls == ["score", "prune"]
    [dense, first] = Frontier.load(out).points
    assert (dense.budget, first.budget, first.latency) == ("dense", "70%", ())
    kept = spvit.load(out / "70pct")
    calls.clear()
    with pytest.raises(RunFolderError, match="is in use; name another folder, or continue"):
        spvit.frontier(host, images, ("70%", "40%"), output=out, config=SHORT)
    found = spvit.frontier(host, images, ("40%",), output=out, config=SHORT, resume=True)
    assert calls == ["prune"]
    assert [point.budget for point in found.points] == ["dense", "70%", "40%"]
    assert found.points[1].seconds == first.seconds
    assert all(len(point.latency) == 1 for point in found.points)
    assert states_equal(spvit.load(out / "70pct"), kept)
    assert Frontier.load(out).points[1].latency[0].speed_up_range == found.points[1].latency[0].speed_up_range
    more = spvit.frontier(host, images, ("55%",), output=out, config=SHORT, resume=True)
    assert [point.budget for point in more.points] == ["dense", "70%", "55%", "40%"]
    assert states_equal(spvit.load(out / "70pct"), kept)
    with (out / "frontier.csv").open(encoding="utf-8", newline="") as file:
        assert all(float(row["latency_ms_batch_1"]) > 0 for row in csv.DictReader(file))


def test_a_frontier_killed_while_it_repairs_goes_on_at_the_next_block(monkeypatch, tmp_path: Path) -> None:
    host, images, budgets = micro_host(), digits(), ("70%", "40%")
    from spvit.repair import repair as repairing

    repair_block, repaired = repairing.repair_block, []

    def dying(*args: object, **named: object) -> None:
        if len(repaired) == 3:
            raise KeyboardInterrupt
        repaired.append(args)
        repair_block(*args, **named)

    spvit.frontier(host, images, budgets, output=tmp_path / "whole", config=SHORT)
    monkeypatch.setattr(repairing, "repair_block", dying)
    with pytest.raises(KeyboardInterrupt):
        spvit.frontier(host, images, budgets, output=tmp_path / "run", config=SHORT)
    monkeypatch.setattr(
        repairing, "repair_block", lambda *args, **named: repaired.append(args) or repair_block(*args, **named)
    )
    spvit.frontier(host, images, budgets, output=tmp_path / "run", config=SHORT, resume=True)
    assert len(repaired) == 2 * len(spvit.Host.of(host).blocks)
    for name in ("70pct", "40pct"):
        assert states_equal(spvit.load(tmp_path / "run" / name), spvit.load(tmp_path / "whole" / name))
        assert not (tmp_path / "run" / name / "state").exists()


def test_backbones_are_judged_by_agreement_with_the_dense_outputs(capsys, tmp_path: Path) -> None:
    size = {"img_size": 32, "patch_size": 8, "in_chans": 3, "num_classes": 0}
    host = spvit.save(micro_host(**size), tmp_path / "host")
    data = str(photographs(tmp_path / "data", count=12, side=32))
    settings = ["--batches", "1", "--images.batch-size", "8", "--calibration-images", "64"]
    out = tmp_path / "run"
    words = ["frontier", str(host), "--data", data, "--budgets=90%,60%", "--output", str(out), *settings]
    code, text, problems = run(capsys, *words)
    assert code == 0, problems
    assert "agreement on 24 validation images" in text
    dense, near, far = Frontier.load(out).points
    assert (dense.agreement, dense.accuracy) == (pytest.approx(1, abs=1e-5), None)
    assert far.agreement < near.agreement < 1
    assert spvit.describe(out / "60pct").metrics == {"agreement": far.agreement}
    assert run(capsys, "profile", str(out / "60pct"))[0] == 0


def test_no_plot_without_matplotlib_and_the_rest_is_there(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    spvit.frontier(micro_host(), digits(), ("50%",), metric="params", output=tmp_path, config=SHORT)
    assert not list(tmp_path.glob("*.svg"))
    [dense, half] = Frontier.load(tmp_path).points
    assert half.params == pytest.approx(0.5 * dense.params, rel=0.01)


def test_budgets_of_latency(capsys, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time_by_macs(monkeypatch)
    words = ("--metric", "latency", "--budgets", "60%", "80%", "1%")
    code, text, _ = run(capsys, *command(dense, tmp_path / "run", *words))
    assert code == 0
    assert "1% is left out: a budget of" in text
    whole, *points = Frontier.load(tmp_path / "run").points
    assert [point.budget for point in points] == ["80%", "60%"]
    assert [(point.macs / whole.macs) ** 0.8 for point in points] == pytest.approx([0.8, 0.6], rel=0.03)
    assert (tmp_path / "run" / "latency_table.json").is_file()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("macs budget 'half' is malformed", "--budgets 50% half"),
        ("cannot be reached", "--budgets 1% 2%"),
        ("of macs, params, latency", "--metric flops"),
        ("expected one or more", "--budgets []"),
        ("batches is (0,), expected 1 or more", "--batches 0"),
        ("repair_views is 0", "--repair-views 0"),
        ("holds no scores that can be read", "--scores nowhere"),
        ("unrecognized arguments: --epochs", "--epochs 1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(capsys, dense: Path, tmp_path: Path, words: str, line: str) -> None:
    refused(capsys, words, *command(dense, tmp_path / "run"), *line.split())
    assert not (tmp_path / "run").exists()


def test_other_bad_input(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="cannot be reached"):
        spvit.frontier(micro_host(), digits(), ("1%",), output=tmp_path / "run", config=SHORT)
    with pytest.raises(DataError, match="10 classes, but the host tells 7 apart"):
        spvit.frontier(micro_host(num_classes=7), digits(), output=tmp_path / "run", config=SHORT)
    with pytest.raises(RunFolderError, match="holds no frontier that can be read"):
        Frontier.load(dense)
    assert not (tmp_path / "run").exists()
    assert "spvit.train.frontier" in sys.modules
