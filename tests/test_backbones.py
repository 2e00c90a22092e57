"""Backbones: pruned inside a larger model by their features, and used as backbones are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spvit
from spvit.architecture import Architecture
from tiny import assert_all_close, assert_close, assert_differ, backward, images, make_host


class Segmenter(nn.Module):
    """A backbone and a dense-prediction head."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.num_features, 5, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        (features,) = self.backbone.get_intermediate_layers(x, 1, reshape=True, norm=True)
        return self.head(features)


def backbone(name: str = "registers") -> Any:
    model: Any = make_host(name)
    model.reset_classifier(0)
    return model


def pruned(host: nn.Module, **options: Any) -> tuple[Any, Architecture]:
    x = images(host, 48)
    architecture = spvit.decide(host, macs="60%", calibration=x, **options)
    return spvit.fold(spvit.prune(host, architecture, repair=x).eval()), architecture


@pytest.fixture(scope="module")
def small() -> Any:
    return pruned(backbone())[0]


def test_a_backbone_is_pruned_inside_a_segmenter_and_put_back() -> None:
    model = Segmenter(backbone()).eval()
    whole, x = copy.deepcopy(model), images(backbone(), 8, seed=5)
    model.backbone, architecture = pruned(model.backbone, objective="tokens")
    with torch.no_grad():
        expected, found = whole(x), model(x)
    assert found.shape == expected.shape
    assert_differ(found, expected)
    assert spvit.cost(whole.backbone, architecture)["macs"] == pytest.approx(
        0.6 * spvit.cost(whole.backbone)["macs"], rel=5e-3
    )


def test_features_and_intermediates_of_a_pruned_backbone(small: Any) -> None:
    x = images(backbone(), 2)
    with torch.no_grad():
        features = small.forward_features(x)
        last, maps = small.forward_intermediates(x, indices=[1, 3], norm=True)
        layers = small.get_intermediate_layers(x, 2, reshape=True, return_prefix_tokens=True, norm=True)
        assert torch.equal(last, features)
        assert [list(each.shape) for each in maps] == [[2, 24, 4, 4]] * 2
        assert torch.equal(layers[1][0], maps[1])
        assert torch.equal(layers[1][1], features[:, : small.num_prefix_tokens])
        assert torch.equal(maps[1].flatten(2).mT, features[:, small.num_prefix_tokens :])
        assert torch.equal(small(x), small.forward_head(features))


def test_lora_trains_on_a_pruned_backbone(small: Any) -> None:
    peft = pytest.importorskip("peft")
    x = images(backbone(), 4)
    with torch.no_grad():
        expected = small(x)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "proj", "fc1", "fc2"])
    model = peft.get_peft_model(copy.deepcopy(small), config).train()
    assert_close(model(x), expected)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):  # LoRA's second map starts at zero
        model(x).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in trained)
    assert_differ(model(x).detach(), expected)
    merged = model.merge_and_unload()
    assert {key for key, _ in merged.named_parameters()} == {key for key, _ in small.named_parameters()}
    assert_close(merged(x), model(x))


def test_gradient_checkpointing_of_a_pruned_backbone_changes_no_gradient(small: Any) -> None:
    x, model = images(backbone(), 2), copy.deepcopy(small).train()
    expected = backward(model, x)
    model.set_grad_checkpointing(True)
    assert_all_close(backward(model, x), expected)
