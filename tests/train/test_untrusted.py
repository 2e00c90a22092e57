"""Nothing in a folder is executed: files that would run code if they were trusted are refused, and run nothing."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import spvit
from spvit.cli.main import main
from spvit.errors import ArchitectureError, CalibrationError, CheckpointError, ModelError, RunFolderError
from spvit.models import ModelConfig, open_model
from spvit.train.loop import Phase, run_phase
from training import MODEL, MODEL_ARGS, digits, micro_host, run_in, short


@pytest.fixture
def marker(tmp_path: Path):
    """Yield a file that harmful content would make, and assert that it was not."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def pickles(marker: Path) -> list[bytes]:
    """Return harmful files: a bare pickle, and what torch.save makes of it."""
    saved = marker.with_name("harmful.pth")
    torch.save({"model": {"weight": Harmful(marker)}}, saved)
    return [pickle.dumps(Harmful(marker), protocol=2), saved.read_bytes()]


def test_harmful_content_would_run_if_it_were_trusted(tmp_path: Path) -> None:
    for index, content in enumerate(pickles(tmp_path / "executed")):
        (tmp_path / "file").write_bytes(content)
        if index == 0:
            pickle.loads(content)
        else:
            torch.load(tmp_path / "file", weights_only=False)
        (tmp_path / "executed").unlink()


def test_weights_are_never_unpickled(tmp_path: Path, marker: Path) -> None:
    folder = spvit.save(micro_host(), tmp_path / "model")
    for content in pickles(marker):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or not a safetensors file"):
            spvit.load(folder)
        (tmp_path / "weights.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged or not a weights file"):
            open_model(
                ModelConfig(model=MODEL, model_args=MODEL_ARGS, pretrained=False, checkpoint=f"{tmp_path}/weights.pth")
            )


def _hosts(marker: Path) -> list[dict[str, Any]]:
    weights = str(marker.with_name("harmful.pth"))
    timm = {"library": "timm", "class": "VisionTransformer", "name": MODEL}
    arguments: list[dict[str, Any]] = [
        {"checkpoint_path": weights},
        {"pretrained": True},
        {"pretrained_cfg": {"file": weights}, "pretrained": True},
        {"pretrained_cfg": {"url": f"file://{weights}", "custom_load": True}},
        {"pretrained_cfg_overlay": {"file": weights}},
        {"pretrained_strict": False},
        {"cache_dir": str(marker.parent)},
    ]
    names = [
        "hf-hub:someone/harmful",
        "hf_hub:someone/harmful",
        f"local-dir:{marker.parent}",
        f"{MODEL}.hf-hub:x/y",
        "../x",
    ]
    config = {"model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 24, "num_attention_heads": 3}
    hf = {"library": "transformers", "attention": "sdpa"}
    return [
        *({**timm, "arguments": {**MODEL_ARGS, **some}} for some in arguments),
        *({**timm, "arguments": MODEL_ARGS, "name": name} for name in names),
        {**hf, "config": {**config, "auto_map": {"AutoModelForImageClassification": "someone/harmful--code.Model"}}},
        {**hf, "config": config, "attention": "someone/harmful-kernels"},
        {**hf, "config": {**config, "attn_implementation": "someone/harmful-kernels"}},
        {**hf, "config": {**config, "_attn_implementation": "someone/harmful-kernels"}},
        {**hf, "config": {**config, "vision_config": {"auto_map": {"AutoModel": "someone/harmful--code.Model"}}}},
        {**hf, "config": {**config, "backbone": "someone/harmful", "use_timm_backbone": True}},
        {**hf, "class": "DPTForDepthEstimation", "config": {"inside": {"backbone": "someone/harmful"}}},
        {**hf, "class": "SiglipVisionModel", "config": {"inside": {"model_type": "timm_wrapper"}}},
        {**hf, "class": "LlavaModel", "config": {"vision_config": {"model_args": {"checkpoint_path": weights}}}},
        {**hf, "class": "TimmWrapperModel", "config": {"model_args": {"checkpoint_path": weights}}},
        *({**hf, "config": config, "class": name} for name in ("os.system", "pipeline", "ViTConfig", "AutoModel", 3)),
    ]


def test_a_description_names_registered_models_and_plain_arguments_only(tmp_path: Path, marker: Path) -> None:
    folder = spvit.save(micro_host(), tmp_path / "model")
    pickles(marker)
    description = json.loads((folder / "model.json").read_text())
    for host in _hosts(marker):
        (folder / "model.json").write_text(json.dumps({**description, "host": host}))
        with pytest.raises(CheckpointError, match=r"cannot be rebuilt: (.* is no |its configuration asks for code)"):
            spvit.load(folder)


def test_settings_name_plain_arguments_only(tmp_path: Path, marker: Path) -> None:
    pickles(marker)
    for name in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"):
        settings = {**MODEL_ARGS, name: str(tmp_path / "harmful.pth")}
        with pytest.raises(ModelError, match=f"'{name}' is no argument of the model {MODEL}"):
            open_model(ModelConfig(model=MODEL, model_args=settings, pretrained=False))


def test_a_state_is_never_unpickled(tmp_path: Path, marker: Path) -> None:
    run_phase(Phase("dense", micro_host(), short(1, keep_best=True)), run_in(tmp_path, digits()))
    states = tmp_path / "state" / "dense"
    assert {path.name for path in states.iterdir()} == {"best.safetensors", "epoch-0001.safetensors"}
    for content in pickles(marker):
        kept = (states / "epoch-0001.safetensors").read_bytes()
        (states / "best.safetensors").write_bytes(content)
        run_phase(Phase("dense", micro_host(), short(1, keep_best=True)), run_in(tmp_path, digits()))
        (states / "epoch-0001.safetensors").write_bytes(content)
        with pytest.raises(RunFolderError, match="no state in .*dense is whole; remove that folder to begin the phase"):
            run_phase(Phase("dense", micro_host(), short(1, keep_best=True)), run_in(tmp_path, digits()))
        (states / "epoch-0001.safetensors").write_bytes(kept)


def test_a_state_of_a_former_version_is_refused(tmp_path: Path, marker: Path) -> None:
    state = tmp_path / "state" / "dense" / "epoch-0001"
    state.mkdir(parents=True)
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin", "sampler.bin"):
        (state / name).write_bytes(pickles(marker)[1])
    file = state.with_name("epoch-0002.safetensors")
    for metadata in (None, {"format": "pt"}, {"spvit": "{}"}, {"spvit": '{"format": 1}'}):
        if metadata is not None:
            save_file({"weight": torch.zeros(1)}, file, metadata=metadata)
        with pytest.raises(
            RunFolderError, match=r"a run of another version of spvit.*begin the run again in another fol"
        ):
            run_phase(Phase("dense", micro_host(), short(2)), run_in(tmp_path, digits()))
    for text in ("__import__('os')", "[1]"):
        save_file({"weight": torch.zeros(1)}, file, metadata={"spvit": text})
        with pytest.raises(RunFolderError, match=r"another version of spvit"):  # epoch-0001 is
            run_phase(Phase("dense", micro_host(), short(2)), run_in(tmp_path, digits()))


def test_architectures_and_scores_are_data(tmp_path: Path, marker: Path) -> None:
    code = f"__import__('os').system('touch {marker}')"
    for text in (code, json.dumps({"py/reduce": code}), json.dumps({"blocks": [code], "skip_rule": code})):
        (tmp_path / "architecture.json").write_text(text)
        with pytest.raises(ArchitectureError):
            spvit.Architecture.load(tmp_path / "architecture.json")
        (tmp_path / "scores.json").write_text(text)
        (tmp_path / "scores.safetensors").write_bytes(pickles(marker)[0])
        with pytest.raises(CalibrationError, match="holds no scores that can be read"):
            spvit.Scores.load(tmp_path)


def test_recipes_and_settings_of_a_run_are_data(tmp_path: Path, marker: Path, monkeypatch, capsys) -> None:
    (tmp_path / "harmful_module.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    plain = {"model": MODEL, "model_args": MODEL_ARGS, "pretrained": False, "data": "digits", "output": "run"}
    spelled = yaml.safe_dump(plain)
    evil = {"class_path": "harmful_module.Evil"}
    texts = [
        spelled + f"checkpoint: !!python/object/apply:os.system ['touch {marker}']\n",
        spelled + f"seed: !!python/object/new:os.system ['touch {marker}']\n",
        spelled + "checkpoint: !!python/name:harmful_module.Evil\n",
        spelled + "checkpoint: !!python/module:harmful_module\n",
        yaml.safe_dump({**plain, "images": evil}),
        yaml.safe_dump({**plain, "dense": evil}),
        yaml.safe_dump({**plain, "model_args": evil}),
        yaml.safe_dump({**plain, "model": "harmful_module:Evil"}),
        yaml.safe_dump({**plain, "dense": {"teacher": "harmful_module:Evil"}}),
        yaml.safe_dump({**plain, "model_args": {**MODEL_ARGS, "norm_layer": evil}}),
    ]
    for text in texts:
        (tmp_path / "recipe.yaml").write_text(text)
        assert main(["train", "--recipe", str(tmp_path / "recipe.yaml")]) == 2
        assert not marker.exists()
        (tmp_path / "resumed").mkdir(exist_ok=True)
        (tmp_path / "resumed" / "config.yaml").write_text("# spvit train\n" + text)
        assert main(["train", "--output", str(tmp_path / "resumed"), "--resume"]) == 2
        assert not marker.exists()
    assert "Traceback" not in capsys.readouterr().err
