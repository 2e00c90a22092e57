"""The hub: what is uploaded, what is downloaded and what never is, the card, and what goes wrong in one line."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn

import spvit
from command import refused, run
from hub_server import Hub, hub_of_test
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.cli.main import parse
from spvit.errors import CheckpointError, HubError, ModelError, ReportError, RunFolderError
from spvit.models import ModelConfig, open_model
from spvit.pages.card import model_card
from spvit.train.run_folder import RunFolder
from training import GREY, micro_host, states_equal

IMAGES = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NAME = "me/small"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_of_test(monkeypatch, str(tmp_path / "cache")) as served:
        yield served


def small_model() -> nn.Module:
    host = micro_host()
    architecture = spvit.decide(host, macs="60%", calibration=IMAGES, multiple=4)
    return spvit.fold(spvit.prune(host, architecture, repair=IMAGES).eval())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "small"
    about = {"preprocessing": GREY, "classes": list("0123456789"), "metrics": {"accuracy": 0.875}}
    return spvit.save(small_model(), folder, **about)


def metadata(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_pushed_model_loads_from_the_hub(hub: Hub, saved: Path) -> None:
    name = spvit.push(saved, NAME)
    assert name == f"hub:{NAME}"
    assert states_equal(spvit.load(name), spvit.load(saved))
    assert spvit.describe(name) == spvit.describe(saved)
    opened = open_model(ModelConfig(model=name))
    assert (opened.classes, opened.preprocessing) == (tuple("0123456789"), GREY)
    files = set(hub.repositories[NAME].files()) - {"network.svg"}
    assert files == {".gitattributes", "model.json", "model.safetensors", "README.md"}


def test_nothing_but_json_and_safetensors_is_downloaded(hub: Hub, saved: Path, tmp_path: Path) -> None:
    spvit.push(saved, NAME)
    hub.repositories[NAME].commit("main", {"model.pth": b"a pickle", "modeling.py": b"raise SystemExit"})
    hub.requests.clear()
    spvit.load(f"hub:{NAME}")
    assert {request.rpartition("/")[2] for request in hub.requests} == {"model.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "cache").rglob("*.*") if path.suffix in (".pth", ".py")} == set()


def test_model_in_memory_goes_under_the_users_name(hub: Hub) -> None:
    host = micro_host(seed=1)
    name = spvit.push(host, "dense", private=True, preprocessing=GREY, metrics={"accuracy": 0.5})
    assert name == "hub:me/dense"
    assert hub.repositories["me/dense"].private
    assert states_equal(spvit.load(name), host)
    assert spvit.describe(name).metrics == {"accuracy": 0.5}


def test_revisions_are_branches_and_commits(hub: Hub, saved: Path) -> None:
    spvit.push(micro_host(seed=1), NAME, preprocessing=GREY)
    first = hub.repositories[NAME].branches["main"]
    assert spvit.push(saved, NAME, revision="half") == f"hub:{NAME}@half"
    assert "half" in hub.repositories[NAME].files("half")["README.md"].decode()
    assert states_equal(spvit.load(f"hub:{NAME}"), micro_host(seed=1))
    assert states_equal(spvit.load(f"hub:{NAME}@half"), spvit.load(saved))
    spvit.push(saved, NAME, overwrite=True)
    assert states_equal(spvit.load(f"hub:{NAME}"), spvit.load(saved))
    assert states_equal(spvit.load(f"hub:{NAME}@{first}"), micro_host(seed=1))
    with pytest.raises(HubError, match="me/small@none: the hub has no such revision"):
        spvit.load(f"hub:{NAME}@none")


def test_cache_serves_offline(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    spvit.push(saved, NAME)
    spvit.load(f"hub:{NAME}")

    def unknown(*_: object) -> None:
        raise socket.gaierror("no such host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    assert states_equal(spvit.load(f"hub:{NAME}"), spvit.load(saved))
    with pytest.raises(HubError, match="the hub cannot be reached, and me/other is not in its cache here; connect"):
        spvit.load("hub:me/other")
    with pytest.raises(HubError, match="the hub cannot be reached; connect, and push .*small again"):
        spvit.push(saved, NAME)


def test_what_the_hub_refuses_takes_one_line(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.make("me/gated", gated=True)
    hub.make("me/empty")
    for name, words in {
        "me/nothing": "the hub has no me/nothing that you may read; check the name, or log in",
        "me/gated": "me/gated is gated on the hub; ask for access",
        "me/empty": "me/empty on the hub holds no model of spvit; one of transformers opens as hf:me/empty",
        "a name/of/none": "'a name/of/none' is no name on the hub, expected USER/MODEL",
    }.items():
        with pytest.raises(HubError, match=words) as refusal:
            spvit.load(f"hub:{name}")
        assert len(str(refusal.value).splitlines()) == 1
    with pytest.raises(HubError, match="the hub refuses this for you/small; check that you own it"):
        spvit.push(saved, "you/small")
    hub.make("me/public")
    with pytest.raises(HubError, match="me/public is public already; make it private on its page first"):
        spvit.push(saved, "me/public", private=True)
    spvit.push(saved, NAME)
    with pytest.raises(HubError, match="me/small holds a model already; name another, or a new revision"):
        spvit.push(saved, NAME)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="no one is logged in to the hub, so me/small cannot be written"):
        spvit.push(saved, NAME)


def test_what_is_no_model_is_not_uploaded(hub: Hub, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no spvit model"):
        spvit.push(tmp_path / "nothing", NAME)
    with pytest.raises(CheckpointError, match="small is a folder, which says itself what metrics would"):
        spvit.push(saved, NAME, metrics={"accuracy": 1.0})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.json").write_bytes((saved / "model.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"model.safetensors does not exist"):
        spvit.push(tmp_path / "damaged", NAME)
    assert hub.repositories == {}


def finished_run(folder: Path, saved: Path, **settings: object) -> Path:
    folder.mkdir()
    for name in ("model.json", "model.safetensors"):
        (folder / name).write_bytes((saved / name).read_bytes())
    own = {"model": "deit_tiny_patch16_224", "data": "/home/someone/photographs", "macs": "60%", "output": "runs/a"}
    RunFolder(folder).write_settings("compress", yaml.safe_dump({**own, "pretrained": True, **settings}))
    figures = {"accuracy": 0.9, "accuracy_top5": 0.99, "loss": 0.5, "images": 1500}
    summary = {"dense": figures, "after_pruning": figures, "pruned": figures}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_card_says_what_the_run_says(saved: Path, tmp_path: Path) -> None:
    card = model_card(finished_run(tmp_path / "run", saved), NAME)
    assert metadata(card) == {
        "license": "apache-2.0",
        "library_name": "spvit",
        "pipeline_tag": "image-classification",
        "base_model": "timm/deit_tiny_patch16_224.fb_in1k",
        "tags": ["spvit", "vision-transformer", "compression", "timm"],
        "metrics": ["accuracy"],
    }
    rows = {line.split(" | ")[0][2:]: line for line in card.splitlines() if line.startswith("| ")}
    assert rows["accuracy"].count("90.00% ") == 3
    assert "1,500" in rows["validation images"]
    assert "264.5k" in rows["MACs of one image"]
    assert "```\nblock  attention  FFN units\n    0  " in card
    assert "`spvit compress --recipe recipe.yaml --output RUN`" in card
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(card.split("```yaml\n")[1].partition("```")[0])
    assert parse(["compress", "--recipe", str(recipe), "--output", "out"])[1].data == "photographs"
    assert "someone" not in card
    assert f'spvit.load("hub:{NAME}")' in card
    assert "apache-2.0, as timm states it of the base model" in card


def test_picture_of_the_report_goes_with_the_card(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    spvit.push(saved, NAME)
    files = hub.repositories[NAME].files()
    assert files["network.svg"].startswith(b"<svg")
    assert "![The network, block by block](network.svg)" in files["README.md"].decode()

    def missing(*_: object, **__: object) -> Path:
        raise ReportError("a report needs jinja2")

    monkeypatch.setattr("spvit.pages.card.report", missing)
    spvit.push(saved, "me/plain")
    assert "network.svg" not in hub.repositories["me/plain"].files()
    assert "network.svg" not in hub.repositories["me/plain"].files()["README.md"].decode()


def test_licence_is_found_or_called_unknown(hub: Hub, saved: Path, tmp_path: Path) -> None:
    def card(
        name: str, license: str | None = None, base_model: str | None = None, **settings: object
    ) -> dict[str, object]:
        folder = tmp_path / name
        return metadata(
            model_card(
                folder if folder.exists() else finished_run(folder, saved, **settings), NAME, license, base_model
            )
        )

    for name, settings in {
        "own weights": {"checkpoint": "weights.pth"},
        "not pretrained": {"pretrained": False},
        "own model": {"model": "models:mine"},
    }.items():
        found = card(name, **settings)
        assert (found["license"], found.get("base_model")) == ("unknown", None)
    assert card("own model", license="my-terms")["license_name"] == "my-terms"
    assert card("own model", license="mit")["license"] == "mit"
    assert card("after another run", model=str(tmp_path / "own model"))["license"] == "unknown"
    about = b"---\nlicense: other\nlicense_name: terms-of-x\n---\n"
    hub.make("x/base").commit("main", {"README.md": about})
    for name, model in {"transformers": "hf:x/base", "hub": "hub:x/base@main"}.items():
        found = card(name, model=model)
        assert (found["base_model"], found["license"], found["license_name"]) == ("x/base", "other", "terms-of-x")
    assert card("own model", base_model="x/base")["license_name"] == "terms-of-x"
    assert card("gone", model="hf:x/gone")["license"] == "unknown"
    (tmp_path / "gone" / "config.yaml").write_text("# spvit compress\n{: [")
    with pytest.raises(RunFolderError, match="config.yaml is damaged"):
        card("gone")
    (tmp_path / "hub" / "summary.json").write_text("{")
    with pytest.raises(RunFolderError, match="summary.json is damaged"):
        card("hub")


def test_transformers_model_comes_back_as_the_class_that_users_know(hub: Hub) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=8, patch_size=2,
        num_channels=1, num_labels=5,
    )  # fmt: skip
    host = transformers.ViTForImageClassification(config).eval()
    small = spvit.prune(host, spvit.decide(host, macs="60%", calibration=IMAGES, multiple=4), repair=IMAGES)
    name = spvit.push(small.eval(), NAME, classes=list("abcde"))
    model = spvit.load(name)
    assert type(model) is transformers.ViTForImageClassification
    assert model.config.num_labels == 5
    assert torch.equal(model(pixel_values=IMAGES).logits, small(pixel_values=IMAGES).logits)
    assert "`ViTForImageClassification` of transformers" in hub.repositories[NAME].files()["README.md"].decode()


def test_model_that_no_library_makes_needs_its_dense_model(hub: Hub) -> None:
    def make() -> nn.Module:
        return timm.models.VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=24, depth=1, num_heads=3)

    pruned = spvit.prune(make().eval(), Architecture((Block(Attention(value_rank=4), FFN(96, (1, 2))),)))
    name = spvit.push(pruned, NAME)
    assert states_equal(spvit.load(name, host=make()), pruned)
    assert f'spvit.load("{name}", host=the_dense_model)' in hub.repositories[NAME].files()["README.md"].decode()


def test_commands(hub: Hub, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "model.json").write_bytes((saved / "model.json").read_bytes())
    refused(capsys, "model.safetensors", "push", str(tmp_path / "weightless"), NAME, "--dry-run")
    code, out, _ = run(capsys, "push", str(saved), NAME, "--dry-run")
    assert (code, hub.repositories) == (0, {})
    assert metadata(out)["library_name"] == "spvit"
    assert "model(images)  # [batch, 1, 8, 8], resized" in out
    code, out, _ = run(capsys, "push", str(saved), NAME, "--license", "mit", "--private")
    assert code == 0
    assert out.strip().endswith(f'is on the hub; load the model with spvit.load("hub:{NAME}")')
    code, out, _ = run(capsys, "evaluate", "--model", f"hub:{NAME}", "--data", "digits")
    assert code == 0
    assert "accuracy" in out
    for command in ("profile", "check"):
        assert run(capsys, command, f"hub:{NAME}")[0] == 0
    refused(capsys, "holds a model already", "push", str(saved), NAME)
    refused(
        capsys, "the hub has no me/none that you may read", "evaluate", "--model", "hub:me/none", "--data", "digits"
    )
    with pytest.raises(ModelError, match="model_args go with timm models only"):
        open_model(ModelConfig(model=f"hub:{NAME}", model_args={"depth": 1}))
