"""Opening models by name: timm, Hugging Face from a local folder, our own folders, weights files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import spvit
from spvit.checkpoint import Preprocessing
from spvit.errors import CheckpointError, ModelError, UnsupportedHostError
from spvit.models import ModelConfig, input_of, number_of_classes, open_model
from training import MODEL, MODEL_ARGS, micro_host, states_equal

MICRO = {"model": MODEL, "model_args": MODEL_ARGS, "pretrained": False}


def test_timm_model_with_arguments_and_without_weights() -> None:
    opened = open_model(ModelConfig(**MICRO))
    assert number_of_classes(opened.model) == 10
    assert not opened.trained
    assert len(opened.preprocessing.mean) == 1


def test_head_is_made_for_the_classes_unless_the_arguments_say() -> None:
    free = {name: value for name, value in MODEL_ARGS.items() if name != "num_classes"}
    assert number_of_classes(open_model(ModelConfig(model=MODEL, model_args=free, pretrained=False), 7).model) == 7
    assert number_of_classes(open_model(ModelConfig(**MICRO), 7).model) == 10


def test_checkpoint_of_the_user_is_loaded(tmp_path: Path) -> None:
    host = micro_host(seed=3)
    torch.save({"model": host.state_dict()}, tmp_path / "weights.pth")
    opened = open_model(ModelConfig(**MICRO, checkpoint=str(tmp_path / "weights.pth")))
    assert opened.trained
    assert states_equal(opened.model, host)


def test_head_follows_the_checkpoint_unless_other_classes_are_wanted(tmp_path: Path) -> None:
    host = micro_host(seed=3)  # of ten classes; timm's own model has a thousand
    torch.save(host.state_dict(), tmp_path / "weights.pth")
    free = {name: value for name, value in MODEL_ARGS.items() if name != "num_classes"}
    config = ModelConfig(model=MODEL, model_args=free, pretrained=False, checkpoint=str(tmp_path / "weights.pth"))
    for classes in (None, 10):
        opened = open_model(config, classes)
        assert opened.trained
        assert states_equal(opened.model, host)
    other = open_model(config, 7)
    assert not other.trained
    assert number_of_classes(other.model) == 7
    assert torch.equal(other.model.blocks[1].mlp.fc2.weight, host.blocks[1].mlp.fc2.weight)


def test_checkpoint_that_does_not_fit_names_the_first_difference(tmp_path: Path) -> None:
    torch.save(micro_host(embed_dim=48).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(
        CheckpointError, match=r"wide.pth does not fit: cls_token is \[1, 1, 48\] there, but \[1, 1, 24\] in the model$"
    ):
        open_model(ModelConfig(**MICRO, checkpoint=str(tmp_path / "wide.pth")))


def test_checkpoint_of_another_image_size_is_resampled_where_the_size_is_named(tmp_path: Path, caplog) -> None:
    small = micro_host(img_size=16)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    unnamed = {name: value for name, value in MODEL_ARGS.items() if name != "img_size"}
    with pytest.raises(CheckpointError, match=r"small.pth does not fit: pos_embed .*; --model-args '\{.*\}' resamples"):
        open_model(
            ModelConfig(model=MODEL, model_args=unnamed, pretrained=False, checkpoint=str(tmp_path / "small.pth"))
        )
    named = {**MODEL_ARGS, "img_size": 24}
    config = ModelConfig(model=MODEL, model_args=named, pretrained=False, checkpoint=str(tmp_path / "small.pth"))
    opened = open_model(config).model
    assert torch.equal(opened.blocks[1].mlp.fc2.weight, small.blocks[1].mlp.fc2.weight)
    assert opened.pos_embed.shape[1] > small.pos_embed.shape[1]
    assert "pos_embed is [" in caplog.text
    assert "resampled to [" in caplog.text


def test_a_run_folder_without_a_model_says_how_to_go_on(tmp_path: Path) -> None:
    killed, frontier = tmp_path / "killed", tmp_path / "frontier"
    for folder, command in ((killed, "compress"), (frontier, "frontier")):
        spvit.save(micro_host(), folder / "dense")
        (folder / "config.yaml").write_text(f"# spvit {command}\nmodel: {MODEL}\n")
    advice = (
        f"the run in {killed} has written no model yet; continue it with: spvit compress --output {killed} --resume"
    )
    with pytest.raises(ModelError, match=f"^{advice}$"):
        open_model(ModelConfig(model=str(killed)))
    with pytest.raises(ModelError, match="no model yet.*spvit frontier --output"):
        open_model(ModelConfig(model=str(frontier)))
    for budget in ("75pct", "50pct"):
        spvit.save(micro_host(), frontier / budget)
    with pytest.raises(ModelError, match=f"a model for each budget; name one of {frontier}/50pct, {frontier}/75pct$"):
        open_model(ModelConfig(model=str(frontier)))
    (killed / "config.yaml").write_text("model: of another program\n")
    with pytest.raises(ModelError, match="is neither a timm model"):
        open_model(ModelConfig(model=str(killed)))


def test_folder_of_ours(tmp_path: Path) -> None:
    host = micro_host(seed=4)
    spvit.save(host, tmp_path / "saved", preprocessing=Preprocessing((0.1,), (0.2,)), classes=list("0123456789"))
    opened = open_model(ModelConfig(model=str(tmp_path / "saved")))
    assert opened.trained
    assert opened.classes == tuple("0123456789")
    assert opened.preprocessing == Preprocessing((0.1,), (0.2,))
    assert states_equal(opened.model, host)
    with pytest.raises(ModelError, match="model_args go with timm models only"):
        open_model(ModelConfig(model=str(tmp_path / "saved"), model_args={"depth": 1}))


def test_hugging_face_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=16, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    host = transformers.ViTForImageClassification(config).eval()
    host.save_pretrained(tmp_path / "hf")
    opened = open_model(ModelConfig(model=f"hf:{tmp_path / 'hf'}"))
    assert opened.trained
    assert states_equal(opened.model, host)
    assert len(opened.classes) == 5
    resized = open_model(ModelConfig(model=f"hf:{tmp_path / 'hf'}"), 3)
    assert number_of_classes(resized.model) == 3
    assert not resized.trained
    with pytest.raises(ModelError, match="model_args go with timm models only"):
        open_model(ModelConfig(model=f"hf:{tmp_path / 'hf'}", model_args={"depth": 1}))


def test_weights_that_cannot_be_had_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="could not download .* deit_tiny_patch16_224 from timm .*--checkpoint"):
        open_model(ModelConfig(model="deit_tiny_patch16_224"))
    pytest.importorskip("transformers")
    with pytest.raises(ModelError, match="could not download the weights of .* from Hugging Face"):
        open_model(ModelConfig(model=f"hf:{tmp_path / 'nothing'}"))


def test_unknown_model_gets_the_nearest_names() -> None:
    with pytest.raises(ModelError, match="'deit_tinny_patch16_224' is neither a timm model.*did you mean deit_tiny"):
        open_model(ModelConfig(model="deit_tinny_patch16_224"))


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="'colour' is no argument of the model vit_tiny_patch16_224"):
        open_model(ModelConfig(model=MODEL, model_args={"colour": 1}, pretrained=False))


def test_published_models_take_the_arguments_of_their_hosts() -> None:
    arguments = {"img_size": 96, "num_classes": 3}
    config = ModelConfig(model="spvit_deit_tiny_patch16_224", model_args=arguments, pretrained=False)
    assert open_model(config).model(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    with pytest.raises(ModelError, match="'checkpoint_path' is no argument of the model deit_tiny_patch16_224"):
        open_model(ModelConfig(model=config.model, model_args={"checkpoint_path": "x"}, pretrained=False))


def test_unsupported_family_is_named() -> None:
    with pytest.raises(UnsupportedHostError, match=r"ResNet is not supported: no self-attention was found"):
        open_model(ModelConfig(model="resnet18", pretrained=False))


def test_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedHostError, match="has no classification head"):
        number_of_classes(torch.nn.Linear(2, 2))


def _config(name: str, **options: object) -> object:
    transformers = pytest.importorskip("transformers")
    small = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48}
    return getattr(transformers, name)(**{**small, "num_hidden_layers": 2, **options})


def test_hugging_face_backbones_and_towers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.Dinov2Model(_config("Dinov2Config"))
    backbone.save_pretrained(tmp_path / "dinov2")
    opened = open_model(ModelConfig(model=f"hf:{tmp_path / 'dinov2'}"))
    assert (type(opened.model), opened.classes, opened.trained) == (transformers.Dinov2Model, None, True)
    assert states_equal(opened.model, backbone)
    headed = open_model(ModelConfig(model=f"hf:{tmp_path / 'dinov2'}"), 3)
    assert (type(headed.model), headed.trained) == (transformers.Dinov2ForImageClassification, False)
    with pytest.raises(UnsupportedHostError, match="has no classification head"):
        number_of_classes(opened.model)
    vision, text = (_config(name).to_dict() for name in ("SiglipVisionConfig", "SiglipTextConfig"))
    both = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    both.save_pretrained(tmp_path / "siglip")
    tower = open_model(ModelConfig(model=f"hf:{tmp_path / 'siglip'}")).model
    assert type(tower) is type(both.vision_model)
    assert states_equal(tower, both.vision_model)


OWN = """
import timm
from spvit import Preprocessing

def vit(depth=2):
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=depth, num_heads=3, in_chans=1)

def prepared():
    return vit(), Preprocessing((0.1,), (0.2,))

def broken():
    raise RuntimeError("no weights\\nat all")

ready = vit()
number = lambda: 3
text = "vit"
"""


@pytest.fixture(name="own")
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{tmp_path.name.strip('_').replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / f"{name}_bad.py").write_text("import no_such_library")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return name


def test_functions_of_the_user_make_models(own: str) -> None:
    opened = open_model(ModelConfig(model=f"{own}:vit", model_args={"depth": 3}), code=True)
    assert (len(opened.model.blocks), len(opened.preprocessing.mean), opened.trained) == (3, 1, True)
    assert open_model(ModelConfig(model=f"{own}:prepared"), code=True).preprocessing == Preprocessing((0.1,), (0.2,))
    assert open_model(ModelConfig(model=f"{own}:ready"), code=True).model is sys.modules[own].ready


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:vit", r"^no module no_such_module is found from /\S+; see no_such_module:vit$"),
        ("{}.inner:vit", r"^no module \S+\.inner is found from "),
        ("{}_bad:vit", r"_bad:vit failed: ModuleNotFoundError: No module named 'no_such_library'$"),
        ("{}:swin", r"^module \S+ has no 'swin'; expected a function or class that returns the model$"),
        ("{}:broken", r":broken failed: RuntimeError: no weights$"),
        ("{}:number", r":number returned int, expected a torch\.nn\.Module$"),
        ("{}:text", r":text failed: TypeError: 'str' object is not callable$"),
    ],
)
def test_functions_that_make_no_model_are_one_line(own: str, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_model(ModelConfig(model=name.format(own)), code=True)


def test_code_is_not_run_unless_allowed(own: str) -> None:
    with pytest.raises(ModelError, match=":vit names code, which only --model on the command line may"):
        open_model(ModelConfig(model=f"{own}:vit"))
    assert own not in sys.modules


def test_relatives_of_known_classes_open(tmp_path: Path) -> None:
    gated = {"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 3, "mlp_ratio": 4}
    config = ModelConfig(model="aimv2_large_patch14_224", model_args=gated, pretrained=False)
    opened = open_model(config)
    assert input_of(opened.model) == (3, (28, 28))
    loaded = spvit.load(spvit.save(opened.model, tmp_path))
    assert states_equal(loaded, opened.model)
