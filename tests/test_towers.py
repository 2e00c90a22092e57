"""Towers of Hugging Face, recognised: scored by their features, pruned, and put back into a model of two towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spvit
from tiny import assert_differ, randomise

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not hasattr(spvit, "recognise"), reason="recognition is not here yet")

TOWER = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
TOWERS: dict[str, tuple[str, dict[str, Any], str]] = {  # class, configuration, and the output that counts
    "Dinov2Model": ("Dinov2Config", {"mlp_ratio": 3}, "pooler_output"),
    "SiglipVisionModel": ("SiglipVisionConfig", {"intermediate_size": 72}, "pooler_output"),
    "CLIPVisionModelWithProjection": (
        "CLIPVisionConfig",
        {"intermediate_size": 72, "projection_dim": 7},
        "image_embeds",
    ),
}


def tower(name: str) -> nn.Module:
    config, options, _ = TOWERS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**TOWER, **options))
    return randomise(model).double().eval()


def pictures(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)


class TwoTowers(nn.Module):
    """Similarities of images to texts, whose tower is one embedding here."""

    def __init__(self, vision: nn.Module, output: str, width: int) -> None:
        super().__init__()
        self.vision, self.output, self.texts = vision, output, nn.Embedding(4, width).double()

    def forward(self, images: Tensor) -> Tensor:
        embedded: Tensor = getattr(self.vision(pixel_values=images), self.output)
        return nn.functional.normalize(embedded, dim=1) @ nn.functional.normalize(self.texts.weight, dim=1).T


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_pruned_by_its_features_and_put_back(name: str) -> None:
    output = TOWERS[name][2]
    model = TwoTowers(tower(name), output, 7 if output == "image_embeds" else 24)
    x = pictures(48)
    host = spvit.recognise(model.vision, x)
    scores = spvit.score(host, x)
    assert scores.objective == "features"
    architecture = spvit.decide(host, macs="60%", scores=scores)
    with torch.no_grad():
        expected, before = model(x), model.vision(pixel_values=x, output_hidden_states=True)
        model.vision = spvit.fold(spvit.prune(host, architecture, repair=x).eval())
        found, after = model(x), model.vision(pixel_values=x, output_hidden_states=True)
    assert_differ(found, expected)
    assert found.shape == expected.shape
    assert after.keys() == before.keys()
    assert [each.shape for each in after.hidden_states] == [each.shape for each in before.hidden_states]
    costs = [spvit.cost(host, architecture)["macs"], spvit.cost(host)["macs"]]
    assert costs[0] <= 0.605 * costs[1]


def test_a_model_without_a_pooler_is_scored_by_its_tokens_alone() -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**TOWER, intermediate_size=72), add_pooling_layer=False)
    host, x = spvit.recognise(randomise(model).double().eval(), pictures(24)), pictures(24)
    named = [spvit.score(host, x, multiple=4, objective=name) for name in ("features", "tokens")]
    assert named[0].blocks == named[1].blocks


def test_lora_and_gradient_checkpointing_on_a_pruned_tower() -> None:
    peft = pytest.importorskip("peft")
    host, x = spvit.recognise(tower("Dinov2Model"), pictures(48)), pictures(48)
    architecture = spvit.decide(host, macs="60%", calibration=x)
    small = spvit.fold(spvit.prune(host, architecture, repair=x).eval())
    expected = small(pixel_values=x[:2]).pooler_output
    model = peft.get_peft_model(small, peft.LoraConfig(r=2, target_modules=["fc1", "fc2"])).train()
    model.base_model.model.gradient_checkpointing_enable()
    found = model(pixel_values=x[:2].requires_grad_()).pooler_output
    torch.testing.assert_close(found, expected)
    found.square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
