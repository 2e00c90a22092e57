"""Pages about runs: what is on them for every kind of run, what they refuse, and their pictures as files."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

import spvit
from command import SHORT, digits_recipe, measure_briefly, refused, run
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.cli.main import main
from spvit.speed.benchmark import Latency
from spvit.train.points import Frontier, Point
from tiny import EVERYTHING, images, make_host, with_kinds


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with every phase of training."""
    folder = tmp_path_factory.mktemp("runs")
    settings = digits_recipe(folder)(dense=SHORT, search=SHORT, finetune=SHORT, log_every=4, macs="60%")
    with pytest.MonkeyPatch.context() as patch:
        measure_briefly(patch)
        assert main(["compress", "--recipe", settings, "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def copied(searched: Path, tmp_path: Path) -> Path:
    """Return a copy of the run."""
    return Path(shutil.copytree(searched, tmp_path / "copy", ignore=shutil.ignore_patterns("report*")))


def text_of(page: Path) -> str:
    """Return the words of a page, without pictures."""
    body = re.sub(r"<svg.*?</svg>", "", page.read_text().partition("<main>")[2], flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def pictures_of(page: Path) -> list[str]:
    """Return the names of a page's pictures."""
    return re.findall(r'<figure class="[^"]*" id="([^"]*)"', page.read_text())


def test_a_run_that_has_ended(searched: Path) -> None:
    page, summary = searched / "report.html", json.loads((searched / "summary.json").read_text())
    text = text_of(page)
    assert f"is right on {summary['pruned']['accuracy']:.1%} of 360 validation images" in text
    assert f"right after pruning {summary['after_pruning']['accuracy']:.2%}" in text
    for words in ("MACs an image", "latency, batch 1", "1 thread", "spvit compress --recipe", "warmup_epochs: 0.0"):
        assert words in text
    assert f"spvit export {searched} --to onnx --data digits" in text
    assert re.search(r"[\d,]+ of 256 images get another prediction than from the dense network", text)
    assert "Not on this page" not in text
    phases = [f"{name}-{phase}" for phase in ("dense", "search", "finetune") for name in ("loss", "accuracy")]
    assert {"network", "kinds", "cost", *phases} <= set(pictures_of(page))
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script""", page.read_text())


def test_image_files_as_files_and_a_page_elsewhere(capsys, searched: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    code, text, problems = run(capsys, "report", str(searched), "--output", str(output), "--svg", "--png")
    assert (code, problems) == (0, "")
    assert text == f"page in {output}; pictures beside it: page-*.svg, page-*.png\n"
    for name in pictures_of(output):
        root = ElementTree.parse(tmp_path / f"page-{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert Image.open(tmp_path / f"page-{name}.png").width == 2 * round(float(root.attrib["width"]))
    assert run(capsys, "report", str(searched), "--output", str(output), "--images", "0")[0] == 0  # a page is replaced
    assert "attention" not in pictures_of(output)
    assert "Dense against pruned" not in text_of(output)


def test_a_run_that_has_not_ended(copied: Path) -> None:
    for name in ("model.json", "model.safetensors", "summary.json", "latency.json"):
        (copied / name).unlink()
    text = text_of(spvit.report(copied))
    assert "under way, or was stopped: it last wrote less than a minute before" in text
    assert "It had come to epoch 1 of finetune." in text
    assert f"spvit compress --output {copied} --resume" in text
    assert "the run has written no model yet" in text
    (copied / "architecture.json").unlink()
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"event": "failure", "message": "the loss became nan"}\n{"phase": "fine')
    page = spvit.report(copied)
    assert "The run failed: the loss became nan. It had come to" in text_of(page)
    assert "network" in pictures_of(page)  # the dense one


def test_the_budget_of_a_latency_stands_by_the_batch_that_it_is_of(copied: Path) -> None:
    settings = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(
        settings.replace("latency: null", "latency: 70%").replace("batch: 1", "batch: 64")
    )
    measured = json.loads((copied / "latency.json").read_text())
    for rows in measured.values():
        rows[1]["batch"] = 64
    (copied / "latency.json").write_text(json.dumps(measured))
    text = text_of(spvit.report(copied, images=0))
    assert text.count("budget 70%") == 1
    assert "budget 70%" in text.partition("latency, batch 64")[2]


def test_a_run_without_labels(copied: Path) -> None:
    figures = {name: {"agreement": value, "images": 30} for name, value in (("dense", 1.0), ("pruned", 0.875))}
    (copied / "summary.json").write_text(json.dumps(figures))
    line = {"phase": "finetune", "event": "evaluation", "epoch": 1, "agreement": 0.875, "images": 30}
    (copied / "metrics.jsonl").write_text(json.dumps(line))
    page = spvit.report(copied)
    text = text_of(page)
    assert "its agreement with the dense one is 0.8750, on 30 held-out images without labels" in text
    assert "agreement 0.8750 dense 1.0000 30 validation images" in text
    assert "agreement-finetune" in pictures_of(page)
    assert "Not on this page" not in text
    settings = copied / "config.yaml"
    settings.write_text(settings.read_text().replace("data: digits", "data: my photos"))
    assert f"spvit export {copied} --to onnx --data &#39;my photos&#39;" in text_of(spvit.report(copied, images=0))


@pytest.mark.parametrize("damage", ["", "[1", "{}", "[]", '{"points": 3}', '{"phase": "search", "event": "step"}'])
def test_missing_and_damaged_files_are_named_and_fail_nothing(copied: Path, damage: str) -> None:
    names = ["architecture.json", "summary.json", "latency.json", "metrics.jsonl", "config.yaml", "scores.json"]
    for name in [*names, "frontier.json"]:
        (copied / name).write_text(damage)
    text = text_of(spvit.report(copied))
    assert "Not on this page" in text
    assert "architecture file" in text
    assert "A model that spvit saved" in text  # its settings do not say of which command they are
    for name in [*names, "frontier.json", "model.json"]:
        (copied / name).unlink()
        (copied / "metrics.jsonl").write_text(
            '{"phase": "dense", "event": "evaluation", "epoch": 1, "accuracy": 0.5}\n'
        )
        spvit.report(copied)


def test_a_backbone_with_images_and_its_host(tmp_path: Path) -> None:
    host = make_host("class_token")
    host.reset_classifier(0)
    x = images(host, 6).float()
    small = spvit.prune(host, with_kinds(EVERYTHING, "msa", "conv3", "skip", "msa"))
    spvit.save(small, tmp_path / "small")
    page = spvit.report(tmp_path / "small", host=host.train(), images=x)
    assert host.training  # it stays as it is
    text = text_of(page)
    assert re.search("On 6 images the mean cosine of dense and pruned features is 0.[0-9]{3}, at worst", text)
    assert {"changed", "attention"} <= set(pictures_of(page))
    spvit.save(spvit.prune(host, with_kinds(EVERYTHING, *["conv1"] * 4)), tmp_path / "small", overwrite=True)
    text = text_of(spvit.report(tmp_path / "small", host=host, images=x))
    assert "the pruned network keeps no attention, or none that can be read" in text
    assert "pass the dense model: spvit.report(folder, host=model)" in text_of(spvit.report(tmp_path / "small"))


def test_the_network_in_numbers_and_in_its_outline(tmp_path: Path) -> None:
    host = make_host("swin")
    narrow = Attention(heads=(0, 2), value_rank=4)
    kept = [Block(narrow, FFN(72, (1, 5, 7))), Block(Attention("skip"), FFN.whole(72))]
    kept += [Block(Attention("conv3"), FFN.whole(144)), Block(Attention(), FFN(144, tuple(range(36))))]
    spvit.save(spvit.prune(host, Architecture(tuple(kept))), tmp_path / "small")
    page = spvit.report(tmp_path / "small", svg=True)
    text = text_of(page)
    assert "attention, 2 of 3 heads, values 4 of 8 3 of 72" in text
    assert "Numbers above are stages." in text
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    boxes: dict[str, list[tuple[float, float]]] = {}
    for box in ElementTree.parse(tmp_path / "small" / "report-network.svg").iter("{http://www.w3.org/2000/svg}rect"):
        if box.attrib["height"] not in ("100%", "11"):  # the paper and the legend
            size = (float(box.attrib["width"]), float(box.attrib["height"]))
            boxes.setdefault(box.attrib["class"], []).append(size)
    whole = boxes["outline hollow"][0][0]
    assert [width / whole for width, _ in boxes["msa"][:4]] == pytest.approx([2 / 3, 1 / 3, 1, 1], abs=1e-3)
    outlines = [boxes["outline hollow"][index][1] for index in (2, 3, 5, 8)]  # FFNs: 72, 72, 144 and 144 units
    assert outlines[2] / outlines[0] == pytest.approx(2**0.5, abs=1e-3)
    shares = [height / outline for (_, height), outline in zip(boxes["ffn"], outlines)]
    assert shares == pytest.approx([3 / 72, 1, 1, 1 / 4], abs=1e-3)
    assert len(boxes["conv3"]) == len(boxes["outline dashed"]) == 1
    assert "block 0: attention, 2 of 3 heads" in (tmp_path / "small" / "report-network.svg").read_text()


def test_a_frontier_and_a_budget_of_it(searched: Path, tmp_path: Path) -> None:
    shutil.copytree(searched, tmp_path / "50pct")
    (tmp_path / "50pct" / "config.yaml").rename(tmp_path / "config.yaml")
    latency = Latency(2.0, 0.1, 4000.0, 1.0, (0.9, 1.1), True, 8, "cpu", "float32", "torch", threads=1, repeats=9)
    dense = Point("dense", None, macs=200, params=90, accuracy=0.9, latency=(latency,))
    half = replace(dense, budget="50%", folder="50pct", macs=100, accuracy=0.8)
    Frontier("ViT", "macs", 1000, (dense, half)).save(tmp_path)
    page = spvit.report(tmp_path)
    says = "at 50% of the MACs the accuracy is 80.00%, of the dense network 90.00%, on 1,000 validation images"
    assert says in text_of(page)
    assert pictures_of(page)[:3] == ["frontier-macs", "frontier-8", "network-50pct"]
    text = text_of(spvit.report(tmp_path / "50pct", images=0))
    assert "is right on 80.0% of 1,000 validation images, the dense one on 90.0%: 10.0 points less." in text
    assert "2.00 ms dense 2.00 ms 1.00x as fast (0.90 to 1.10; noise)" in text
    assert f"spvit compress --recipe {tmp_path}/config.yaml" in text


def test_what_is_no_run_is_refused(capsys, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(spvit.RunFolderError, match="is no run folder: it holds none of config.yaml"):
        spvit.report(tmp_path)
    refused(capsys, "is not a folder", "report", str(tmp_path / "nowhere"))
    refused(capsys, "images is 1001, expected 0 to 1,000", "report", str(searched), "--images", "1001")
    other = tmp_path / "notes.html"
    other.write_text("mine")
    with pytest.raises(spvit.ReportError, match="is no page of spvit's, so it stays as it is; name another"):
        spvit.report(searched, other)
    assert other.read_text() == "mine"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = "needs jinja2 and matplotlib; install with: pip install 'spvit[report]'"
    refused(capsys, missing, "report", str(searched), "--png")


def test_compress_says_how_to_get_a_page_without_the_extra(capsys, tmp_path: Path, monkeypatch) -> None:
    measure_briefly(monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = digits_recipe(tmp_path)(dense=SHORT, calibration_images=64)
    words = ["compress", "--recipe", settings, "--output", str(tmp_path / "run"), "--no-train"]
    code, text, problems = run(capsys, *words)
    assert (code, problems) == (0, "")
    assert "no page about this run: a report needs jinja2; install with: pip install 'spvit[report]'; later: " in text
    assert not (tmp_path / "run" / "report.html").exists()
