"""Model folders: exact round trips, descriptions, and every damaged or unfitting file."""

from __future__ import annotations

import copy
import json
import os
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.checkpoint import (
    DESCRIPTION,
    WEIGHTS,
    Description,
    Preprocessing,
    describe,
    fit_state,
    read_weights,
    write_text,
)
from spvit.errors import CheckpointError, UnsupportedHostError
from spvit.hosts.recognise import family_of
from spvit.replacements.narrow import NarrowAttention
from spvit.surgery import pruned_record
from tiny import (
    EVERYTHING,
    HOSTS,
    MIXED,
    assert_close,
    assert_untouched,
    everything_of,
    images,
    logits,
    make_host,
    make_net,
    randomise,
    with_kinds,
)

LOOKS = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "bilinear", 0.875)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", ["dense", "pruned", "folded"])
@pytest.mark.parametrize("name", ["class_token", "distilled", "huggingface_options"])
def test_saved_models_load_bit_identically(name: str, stage: str, dtype: torch.dtype, tmp_path: Path) -> None:
    host, net = make_net(name, dtype=dtype)
    model = host if stage == "dense" else spvit.prune(host, spvit.decide(net), weights=net)
    model = spvit.fold(model) if stage == "folded" else model
    folder = spvit.save(model.train(), tmp_path / "new" / "folder")
    assert folder == tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, DESCRIPTION])
    loaded = spvit.load(str(folder))
    assert not loaded.training
    assert type(loaded) is type(host)
    assert torch.equal(logits(loaded, images(host)), logits(model.eval(), images(host)))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert pruned_record(loaded) == pruned_record(model)
    again = spvit.save(loaded, tmp_path / "again")
    for file in (WEIGHTS, DESCRIPTION):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("name", ["registers", "no_biases", "huggingface_options"])
def test_narrow_attention_and_its_rules_load_as_they_were(
    name: str, repaired: bool, folded: bool, tmp_path: Path
) -> None:
    host = make_host(name)
    kept = (Attention("msa", (0, 2), 3, 5), Attention("conv1"), Attention("skip"), Attention("msa", value_rank=2))
    blocks = tuple(Block(attention, FFN(72, tuple(range(0, 72, 2)))) for attention in kept)
    architecture = Architecture(blocks, "linear", "mean")
    model = spvit.prune(host, architecture, repair=images(host, 16) if repaired else None)
    randomise(model, seed=3)  # so that no weight is one that building it again would give
    model = spvit.fold(model) if folded else model
    loaded = spvit.load(spvit.save(model, tmp_path))
    assert torch.equal(logits(loaded, images(host)), logits(model, images(host)))
    assert pruned_record(loaded) == pruned_record(model)
    assert describe(tmp_path).architecture == architecture
    assert type(loaded.get_submodule(family_of(host).sites[0].attention.path)) is NarrowAttention


@pytest.mark.parametrize("name", HOSTS)
def test_every_dense_host_can_be_saved(name: str, tmp_path: Path) -> None:
    host = make_host(name)
    assert torch.equal(logits(spvit.load(spvit.save(host, tmp_path)), images(host)), logits(host, images(host)))


def test_the_description_says_all(tmp_path: Path) -> None:
    host, net = make_net("class_token")
    architecture = spvit.decide(net)
    folded = spvit.fold(spvit.prune(host, architecture, weights=net))
    classes = ["cat", "dog", "Ärmel", "d", "e", "f", "g"]
    spvit.save(folded, tmp_path, preprocessing=LOOKS, classes=classes, metrics={"top1": 71.5})
    found = describe(tmp_path)
    assert found.host["library"] == "timm"
    assert found.architecture == architecture
    assert found.folded
    assert found.preprocessing == LOOKS
    assert found.classes == tuple(classes)
    assert found.metrics == {"top1": 71.5}
    spvit.save(host, tmp_path / "dense")
    assert describe(tmp_path / "dense") == Description(found.host, input_size=found.input_size)
    assert found.input_size == images(host).shape[1:]


def test_a_folder_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    first, second = make_host("class_token"), randomise(make_host("class_token"), seed=5)
    x = images(first)
    spvit.save(first, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a model already; name another folder, or pass overwrite=True"):
        spvit.save(second, tmp_path)
    assert torch.equal(logits(spvit.load(tmp_path), x), logits(first, x))
    spvit.save(second, tmp_path, overwrite=True)
    assert torch.equal(logits(spvit.load(tmp_path), x), logits(second, x))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([WEIGHTS, DESCRIPTION])


def test_saving_what_cannot_be_rebuilt_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedHostError, match="Linear is not supported"):
        spvit.save(nn.Linear(2, 2), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_models_that_timm_did_not_create_load_onto_a_dense_one(tmp_path: Path) -> None:
    import timm

    def make() -> nn.Module:
        return timm.models.VisionTransformer(img_size=32, embed_dim=24, depth=1, num_heads=3)

    host = make().eval()
    pruned = spvit.prune(host, Architecture((Block(Attention(value_rank=4), FFN(96, (1, 2))),)))
    loaded = spvit.load(spvit.save(pruned, tmp_path), host=make())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), pruned(x))
    with pytest.raises(
        CheckpointError, match=r"a timm\.models\.vision_transformer\.VisionTransformer, which cannot be"
    ):
        spvit.load(tmp_path)


class Adapted(nn.Linear):
    """A linear layer with a low-rank addition, as adapters make them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.lora_a = nn.Parameter(torch.ones(2, linear.in_features))


def test_what_load_could_not_rebuild_is_not_saved(tmp_path: Path) -> None:
    host, net = make_net("class_token")
    pruned = spvit.prune(host, spvit.decide(net), weights=net)
    shorter, adapted, wider = (copy.deepcopy(model) for model in (pruned, pruned, host))
    shorter.prune_intermediate_layers([1])
    adapted.blocks[3].attn.qkv = Adapted(adapted.blocks[3].attn.qkv)
    wider.head = nn.Linear(24, 11)
    for model, message in (
        (shorter, r"its blocks\.2\.\S+ is missing, but \[.*\] in what spvit\.load would rebuild"),
        (adapted, r"its blocks\.3\.attn\.qkv\.lora_a is \[2, 24\], but missing in what .*model\.merge_and_unload\(\)"),
        (wider, r"its head\.weight is \[11, 24\], but \[7, 24\] in what"),
    ):
        with pytest.raises(CheckpointError, match=f"this model cannot be saved: {message}"):
            spvit.save(model, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def test_files_without_the_input_size_are_read(tmp_path: Path) -> None:
    host, net = make_net("class_token")
    model = spvit.fold(spvit.prune(host, spvit.decide(net), weights=net))
    spvit.save(model, tmp_path, preprocessing=LOOKS)
    found = describe(tmp_path)
    assert found.input_size == images(host).shape[1:]


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    spvit.save(make_host("class_token"), tmp_path / "model")
    plain = tmp_path / "plain"
    plain.write_text("")
    expected = stat.S_IMODE(os.stat(plain).st_mode)
    for file in (WEIGHTS, DESCRIPTION):
        assert stat.S_IMODE(os.stat(tmp_path / "model" / file).st_mode) == expected, file


def test_write_text_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "a long first text ä")
    write_text(str(path), "short")
    assert path.read_text() == "short"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


@pytest.fixture(name="saved")
def _saved(tmp_path: Path) -> Path:
    host, net = make_net("class_token")
    return spvit.save(spvit.prune(host, spvit.decide(net), weights=net), tmp_path / "model", preprocessing=LOOKS)


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of a folder's description; ... removes one."""
    data = {**json.loads((folder / DESCRIPTION).read_text()), **changes}
    (folder / DESCRIPTION).write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, r'is not a model of this version, expected "format": "spvit-model", "version": 1'),
        ({"format": ...}, "is not a model of this version"),
        ({"version": 2}, "is not a model of this version"),
        ({"colour": 1}, "unknown field 'colour', expected host, input_size, architecture, folded, preprocessing"),
        ({"host": ...}, "field 'host' is missing"),
        ({"architecture": {}}, "not an architecture"),
        ({"architecture": 3}, "not an architecture: expected"),
        ({"preprocessing": {"mean": [0.5]}}, "1 values of mean and 3 of std"),
        ({"preprocessing": {"mean": [0.5], "std": [0.5], "zoom": 2}}, "zoom"),
        ({"preprocessing": 3}, "model.preprocessing is 3, expected an object or null"),
        ({"classes": 3}, "model.classes is 3, expected a list or null"),
    ],
)
def test_wrong_descriptions_are_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit(saved, **changes)
    for read in (describe, spvit.load):
        with pytest.raises(CheckpointError, match=rf"model\.json.*{message}"):
            read(saved)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_descriptions_that_are_not_json_are_refused(saved: Path, content: bytes) -> None:
    (saved / DESCRIPTION).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.json is not valid JSON"):
        spvit.load(saved)


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_descriptions_that_are_no_objects_are_refused(saved: Path, content: str) -> None:
    (saved / DESCRIPTION).write_text(content)
    with pytest.raises(CheckpointError, match="is not a model of this version"):
        describe(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": {"library": "keras"}}, "the file names no model of timm or transformers but a keras, which"),
        ({"host": {}}, "library"),
        ({"host": {"library": "timm", "name": 3, "arguments": {}}}, "no attribute"),
        ({"host": {"library": "timm", "arguments": {}}}, "name"),
        ({"host": {"library": "timm", "name": "no_such_model", "arguments": {}}}, "no_such_model"),
        ({"host": {"library": "timm", "name": "vit_tiny_patch16_224", "arguments": {"wings": 2}}}, "wings"),
        (
            {"architecture": json.loads(spvit.Architecture(EVERYTHING.blocks[:2]).to_json())},
            "the architecture has 2 blocks, but this",
        ),
        ({"architecture": ..., "folded": True}, "fold takes a model that spvit.prune returned"),
    ],
)
def test_models_that_cannot_be_rebuilt_are_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit(saved, **changes)
    with pytest.raises(CheckpointError, match=rf"model\.json: the model cannot be rebuilt: .*{message}"):
        spvit.load(saved)


def test_missing_files_are_named(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere holds no spvit model: model\.json is missing"):
        spvit.load(tmp_path / "nowhere")
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint .*model\.safetensors does not exist"):
        spvit.load(saved)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_damaged_weights_are_named(saved: Path, damage: str) -> None:
    path = saved / WEIGHTS
    path.write_bytes({"cut": path.read_bytes()[:-100], "empty": b"", "noise": bytes(range(256)) * 4}[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or not a safetensors file"):
        spvit.load(saved)


def test_weights_that_do_not_fit_the_description_are_named(saved: Path) -> None:
    state = load_file(saved / WEIGHTS)
    state.pop("blocks.3.attn.qkv.weight")
    save_file(state, saved / WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"safetensors does not fit: blocks\.3\.attn\.qkv\.weight is missing there, but \["
    ):
        spvit.load(saved)


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(1)}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.pth", STATE),
        ("ordered.pt", OrderedDict(STATE)),
        ("deit.pth", {"model": STATE, "epoch": 3}),
        ("timm.bin", {"state_dict": STATE, "arch": "x"}),
        ("plain.safetensors", STATE),
    ],
)
def test_weights_are_found_in_files_of_any_form(tmp_path: Path, name: str, content: Any) -> None:
    path = tmp_path / name
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    found = read_weights(path)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], value) for key, value in STATE.items())


class Harmful:
    """Runs code when it is unpickled, unless only weights are read."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"not a pickle", r"a\.pth is damaged or not a weights file: "),
        ("a.pth", b"", r"a\.pth is damaged or not a weights file"),
        ("a.pth", Harmful(), r"a\.pth is damaged or not a weights file: "),
        ("a.pth", {"model": Harmful()}, r"a\.pth is damaged or not a weights file: "),
        ("a.pth", [torch.ones(1)], r"a\.pth holds no weights: expected a dictionary of tensors"),
        ("a.pth", {}, r"a\.pth holds no weights"),
        ("a.pth", {"model": {}}, r"a\.pth holds no weights"),
        ("a.pth", {"epoch": 3}, r"a\.pth holds no weights: expected a dictionary of tensors, found the keys epoch"),
        ("a.pth", {"model": STATE, "path": Path("x")}, r"it holds a pathlib.*, which is not read since it could run"),
        ("a.npz", b"", r"a\.npz: expected a \.safetensors or \.pth file, found \.npz"),
        ("weights", b"", r"weights: expected a \.safetensors or \.pth file, found no ending"),
        ("a.safetensors", b"not one", r"a\.safetensors is damaged or not a safetensors file"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", r"it is a pointer of git-lfs or a web page"),
        ("a.pth", b"<!DOCTYPE html>", r"it is a pointer of git-lfs or a web page; download the file itself"),
        ("a.safetensors", None, r"a\.safetensors does not exist"),
    ],
)
def test_files_without_weights_are_refused(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"checkpoint .*{message}"):
        read_weights(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": ...}, r"checkpoint f does not fit: weight is missing there, but \[4, 3\] in the model"),
        ({"bias": torch.ones(5)}, r"checkpoint f does not fit: bias is \[5\] there, but \[4\] in the model"),
        ({"extra": torch.ones(2, 1)}, r"checkpoint f does not fit: extra is \[2, 1\] there, but missing in the model"),
    ],
)
def test_states_that_do_not_fit_change_nothing(changes: dict[str, Any], message: str) -> None:
    model = nn.Linear(3, 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {"weight": torch.ones(4, 3), "bias": torch.ones(4), **changes}
    with pytest.raises(CheckpointError, match=message):
        fit_state(model, {key: value for key, value in state.items() if value is not ...}, "f")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_states_that_fit_are_loaded() -> None:
    model = nn.Linear(3, 4)
    fit_state(model, {"weight": torch.ones(4, 3), "bias": torch.zeros(4)}, "f")
    assert_close(model(torch.ones(1, 3)), torch.full((1, 4), 3.0))


def test_a_model_of_another_class_is_refused(tmp_path: Path) -> None:
    path = spvit.save(make_host("class_token"), tmp_path / "saved") / DESCRIPTION
    data = json.loads(path.read_text())
    data["host"]["class"] = "ResNet"
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="rebuilt: the host's class is 'ResNet', but what timm makes is a Vis"):
        spvit.load(tmp_path / "saved")


def _transformers(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"image_size": 64, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3}
    config = getattr(transformers, name).config_class(**{**small, "intermediate_size": 72, **options})
    return getattr(transformers, name)(config, **({"add_pooling_layer": False} if name == "ViTModel" else {}))


def _timm(name: str, **options: Any) -> nn.Module:
    small = {"img_size": 64, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 7}
    return pytest.importorskip("timm").create_model(name, **{**small, **options})


FOUND = {
    "eva02": lambda: _timm("eva02_tiny_patch14_224", img_size=56),
    "dinov2": lambda: _transformers("Dinov2Model", patch_size=16),
    "without pooling": lambda: _transformers("ViTModel"),
    "siglip": lambda: _transformers("SiglipVisionModel"),
    "swin": lambda: _transformers(
        "SwinModel", patch_size=4, window_size=4, embed_dim=24, depths=[2, 2], num_attention_heads=[3, 3]
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_models_that_were_recognised_are_rebuilt(name: str, tmp_path: Path) -> None:
    host = randomise(FOUND[name]()).eval()
    known = spvit.recognise(host)
    x = torch.randn(2, *known.input_size)
    blocks = [Block(Attention(kind), FFN.whole(sites.ffn.units)) for kind, sites in zip(MIXED, known.blocks)]
    blocks[3] = Block(Attention(heads=(0, 2), value_rank=4), FFN(blocks[3].ffn.width, (1, 3, 4)))
    pruned = spvit.prune(known, Architecture(tuple(blocks)))
    for folder, model in (("dense", host), ("pruned", pruned), ("folded", spvit.fold(pruned))):
        loaded = spvit.load(spvit.save(model, tmp_path / folder))
        assert type(loaded) is type(host)
        with torch.no_grad():
            found, expected = (first(model(x)) for model in (loaded, model))
        assert torch.equal(found, expected)
        assert describe(tmp_path / folder).input_size == known.input_size
        again = spvit.save(loaded, tmp_path / f"{folder} again")
        assert (again / DESCRIPTION).read_bytes() == (tmp_path / folder / DESCRIPTION).read_bytes()
    assert pruned_record(spvit.load(tmp_path / "pruned")) == pruned_record(pruned)


def first(output: Any) -> torch.Tensor:
    """Return the first tensor of what a model answers."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _torchvision(width: int = 24, depth: int = 4) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(64, 16, depth, 3, width, 72, num_classes=7)


def test_other_models_load_onto_a_dense_one(tmp_path: Path) -> None:
    host = randomise(_torchvision()).eval()
    pruned = spvit.prune(host, with_kinds(EVERYTHING, *MIXED))
    x = torch.randn(2, 3, 64, 64)
    frame = _torchvision().train()
    before = everything_of(frame)
    for name, model in (("dense", host), ("pruned", pruned), ("folded", spvit.fold(pruned))):
        folder = spvit.save(model, tmp_path / name, classes=list("abcdefg"))
        loaded = spvit.load(folder, host=frame)
        assert not loaded.training
        assert torch.equal(logits(loaded, x), logits(model, x))
        assert_untouched(frame, before)
        with pytest.raises(CheckpointError, match=r"VisionTransformer, which cannot be made .*\(folder, host=model\)"):
            spvit.load(folder)
    saved = spvit.save(spvit.recognise(host), tmp_path / "host", classes=list("abcdefg"))
    assert (saved / DESCRIPTION).read_text() == (tmp_path / "dense" / DESCRIPTION).read_text()
    for other, message in (
        (_torchvision(width=48), r"class_token is \[1, 1, 48\] there, but \[1, 1, 24\] in the file"),
        (_torchvision(depth=3), r"encoder\.layers\.encoder_layer_3\.ln_2\.bias is missing there, but \[24\] in the"),
        (nn.Linear(2, 3), r"weight is \[3, 2\] there, but missing in the file"),
    ):
        with pytest.raises(CheckpointError, match=f"host= does not fit: {message}"):
            spvit.load(tmp_path / "pruned", host=other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": 3}, r"host\.family\.sites is 3, expected a list"),
        ({"images": None}, r"host\.family\.images is None, expected text"),
        ({"sites": [], "colour": 1}, r"host\.family: unknown field 'colour'"),
    ],
)
def test_odd_sites_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = spvit.save(make_host("huggingface"), tmp_path)
    host = json.loads((folder / DESCRIPTION).read_text())["host"]
    edit(folder, host={**host, "family": {**host["family"], **change}})
    with pytest.raises(CheckpointError, match=rf"model\.json: the model cannot be rebuilt: {message}"):
        spvit.load(folder)


def test_another_release_of_transformers_is_named(tmp_path: Path) -> None:
    folder = spvit.save(make_host("huggingface"), tmp_path)
    host = json.loads((folder / DESCRIPTION).read_text())["host"]
    edit(folder, host={**host, "config": {**host["config"], "transformers_version": "4.0.0"}})
    spvit.load(folder)
    weights = {f"old.{key}": value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="written with transformers 4.0.0, which may name layers otherwise than"):
        spvit.load(folder)
