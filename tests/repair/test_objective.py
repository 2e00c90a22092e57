"""Objectives: what counts of the outputs, how far two of them are apart, and the host behind its last block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spvit
from spvit.errors import CalibrationError, DataError
from spvit.hosts.calling import record_calls
from spvit.hosts.host import Host
from spvit.repair.objective import Answer, Objective, answer_of
from spvit.repair.scores import Scores
from tiny import assert_close, images, make_host, randomise

DIM, TOKENS, BATCH = 8, 5, 3


def objective(name: str, prefix: int = 1) -> Objective:
    return Objective(name, prefix)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Layer(nn.Module):
    """One linear layer, called and answering as the blocks of some library do."""

    def __init__(self, answer: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.linear, self.answer, self.kind = nn.Linear(DIM, DIM), answer, "full"

    def forward(self, hidden_states: Tensor, table: Tensor | None = None, mask: Tensor | None = None) -> Any:
        return self.answer(hidden_states + self.linear(hidden_states) + (0 if table is None else table))


class TokensFirst(nn.Module):
    """Turns tokens [B, N, D] into [N, B, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class Pool(nn.Module):
    """Class attention, with keys and values of the tokens' own shape."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return (self.keys(x).mean(-1, keepdim=True).softmax(1) * self.values(x)).sum(1)


class Toy(nn.Module):
    """A model of two blocks on images [B, 1, tokens, width]; `behind` says what comes after them."""

    def __init__(
        self, call: Callable[[nn.Module, Tensor], Tensor], behind: Callable[[Any, Tensor, Tensor], Any]
    ) -> None:
        super().__init__()
        self.stem, self.norm, self.pool = nn.Linear(DIM, DIM), nn.LayerNorm(DIM), Pool()
        self.blocks = nn.ModuleList([Layer(), Layer()])
        self.call, self.behind = call, behind

    def forward(self, pixels: Tensor) -> Any:
        x = self.stem(pixels[:, 0])
        for block in self.blocks:
            assert block.kind == "full"
            x = self.call(block, x)
        return self.behind(self, x, pixels)


def normed(net: Any, x: Tensor, pixels: Tensor) -> Tensor:
    return net.pool(net.norm(x))


def host_of(
    model: nn.Module, images: Tensor, blocks: str = "blocks", prefix: int = 1, token_first: bool = False
) -> Any:
    """Return a host of a randomised model with two blocks, of which nothing but the blocks is known."""
    attention = SimpleNamespace(prefix_tokens=prefix, token_first=token_first)
    paths = (f"{blocks}.0", f"{blocks}.1")
    sites = tuple(SimpleNamespace(path=path, attention=attention, before=None) for path in paths)
    randomise(model).double().eval()

    host = SimpleNamespace(model=model, blocks=sites, calls=dict(zip(paths, record_calls(model, paths, images))))
    host.on = lambda other: SimpleNamespace(**{**vars(host), "model": other})
    return host


CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda block, x: block(x),
    "keyword": lambda block, x: block(mask=None, hidden_states=x),
    "more arguments": lambda block, x: block(x, torch.ones(TOKENS, DIM, dtype=x.dtype), mask=None),
    "tuple": lambda block, x: block(x)[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_tokens_of_blocks_however_they_are_called(name: str) -> None:
    model, x = Toy(CALLS[name], normed), normal(BATCH, 1, TOKENS, DIM)
    if name == "tuple":
        for block in model.blocks:
            block.answer = lambda x: (x, None)
    host = host_of(model, x)
    with torch.no_grad():
        found: list[Any] = []
        host.model.blocks[1].register_forward_hook(lambda module, args, output: found.append(output))
        answer = answer_of(host, x)
        out = found[0][0] if name == "tuple" else found[0]
        assert_close(answer.output, host.model(x))
        assert_close(answer.tokens, host.model.norm(out))  # not the keys or values of the pooling layer


def test_tokens_of_a_transformer_encoder_which_asks_its_layers_for_their_parts() -> None:
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
    net = nn.Sequential(nn.Flatten(1, 2), model)
    x = normal(BATCH, 1, TOKENS, DIM)
    host = host_of(net, x, "1.layers")
    with torch.no_grad():
        assert_close(answer_of(host, x).tokens, net(x))


class Pairs(nn.Module):
    """Blocks as lists of two layers that add to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)]) for _ in range(2))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels[:, 0]
        for first, second in self.layers:
            x = first(x) + x
            x = second(x) + x
        return self.norm(x)


def test_tokens_of_blocks_that_are_lists_of_layers() -> None:
    x = normal(BATCH, 1, TOKENS, DIM)
    host = host_of(Pairs(), x, "layers")
    with torch.no_grad():
        assert_close(answer_of(host, x).tokens, host.model(x))


@pytest.mark.parametrize("back", [False, True])
def test_tokens_of_blocks_that_take_tokens_first_have_images_first(back: bool) -> None:
    def behind(net: Any, x: Tensor, pixels: Tensor) -> Tensor:
        return net.norm(x.transpose(0, 1) if back else x).sum(1 if back else 0)

    model = nn.Sequential(Toy(CALLS["plain"], behind))
    model[0].stem = TokensFirst()
    x = normal(BATCH, 1, TOKENS, DIM)
    host = host_of(model, x, "0.blocks", token_first=True)
    with torch.no_grad():
        answer = answer_of(host, x)
        assert answer.tokens.shape == (BATCH, TOKENS, DIM)
        assert_close(answer.tokens.sum(1), answer.output)


@pytest.mark.parametrize("name", ["class_token", "registers", "average_pooling", "swin_padded"])
def test_tokens_of_timm_are_those_behind_the_last_norm(name: str) -> None:
    model: Any = make_host(name)
    x = images(model, 2)
    with torch.no_grad():
        found = answer_of(Host.of(model), x).tokens
        assert torch.equal(found, model.forward_features(x))


def test_tokens_of_hugging_face_are_the_last_hidden_state() -> None:
    model: Any = make_host("huggingface")
    x = images(model, 2)
    with torch.no_grad():
        found = answer_of(Host.of(model), x).tokens
        assert torch.equal(found, model.vit(x).last_hidden_state)


TOWER = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
TOWERS = {  # class, configuration, list of blocks, prefix tokens, and whether all is behind the last block
    "Dinov2Model": ("Dinov2Config", {}, "encoder.layer", 1, True),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", {}, "encoder.layer", 5, True),
    "Dinov2Backbone": ("Dinov2Config", {"out_features": ["stage1", "stage2"]}, "encoder.layer", 1, False),
    "DINOv3ViTModel": ("DINOv3ViTConfig", {"intermediate_size": 48}, "model.layer", 1, True),
    "SiglipVisionModel": ("SiglipVisionConfig", {"intermediate_size": 48}, "encoder.layers", 0, True),
    "CLIPVisionModelWithProjection": (
        "CLIPVisionConfig",
        {"projection_dim": 7},
        "vision_model.encoder.layers",
        1,
        True,
    ),
    "ViTModel": ("ViTConfig", {"intermediate_size": 48}, "layers", 1, True),
}


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_hugging_face(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config, options, blocks, prefix, exact = TOWERS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**TOWER, **options))
    x = normal(2, 3, 32, 32)
    host = host_of(model, x, blocks, prefix)
    with torch.no_grad():
        answer = answer_of(host, x)
    if exact:
        assert torch.equal(answer.tokens, answer.output.last_hidden_state)
    maps = [[2, 24, 4, 4]] * 2
    pooled = [[2, 7 if name.startswith("CLIP") else 24]] if exact else maps
    tokens = [[2, prefix, 24], [2, 16, 24]] if prefix else [[2, 16, 24]]
    assert [list(part.shape) for part in objective("features", prefix).parts(answer)] == pooled + tokens


def test_a_block_that_is_left_out_is_named() -> None:
    host = host_of(Toy(CALLS["plain"], normed), normal(2, 1, TOKENS, DIM))
    host.model.call = lambda block, x: x
    with pytest.raises(CalibrationError, match=r"last block blocks\.1 was not reached; its forward pass leaves it out"):
        answer_of(host, normal(2, 1, TOKENS, DIM))


def test_parts_of_an_answer() -> None:
    tokens, output = normal(BATCH, TOKENS, DIM), normal(BATCH, DIM)
    answer = Answer(output, tokens)

    def shapes(own: Objective, answer: Answer = answer) -> list[list[int]]:
        return [list(part.shape) for part in own.parts(answer)]

    pooled, prefix, patches = [BATCH, DIM], [BATCH, 2, DIM], [BATCH, 3, DIM]
    assert shapes(objective("features", 2)) == [pooled, prefix, patches]
    assert shapes(objective("tokens", 2)) == [prefix, patches]
    assert shapes(objective("tokens", 0)) == [[BATCH, TOKENS, DIM]]
    assert shapes(objective("pooled")) == shapes(objective("logits")) == [pooled]
    assert shapes(objective("features"), Answer(tokens, tokens)) == [[BATCH, 1, DIM], [BATCH, 4, DIM]]
    assert shapes(objective("pooled"), Answer([output, tokens], tokens)) == [pooled, [BATCH, TOKENS, DIM]]
    own = Objective("function mean", 1, lambda output: output.mean(1))
    assert shapes(own) == [[BATCH]]


@pytest.mark.parametrize("shape", [(BATCH, 1), (BATCH, TOKENS, DIM)])
def test_what_are_no_logits_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError, match=r"output is \[3, .*which are not the logits of 2 or more classes"):
        objective("logits").parts(Answer(normal(*shape), normal(BATCH, TOKENS, DIM)))


def test_scales_are_the_variance_over_images_or_their_number() -> None:
    dense = list((10 + normal(6, TOKENS, DIM)).split([4, 2]))
    whole = torch.cat(dense)
    assert objective("tokens").scale(dense) == pytest.approx(float((whole - whole.mean(0)).square().sum()))
    assert objective("logits").scale(dense) == 6


@pytest.mark.parametrize("name", ["logits", "features"])
def test_directions_have_the_curvature_of_the_distance_as_their_second_moment(name: str) -> None:
    dense = normal(1, 4)

    def distance(found: Tensor) -> Tensor:
        if name == "features":
            return (found - dense).square().sum()
        return (dense.softmax(1) * (dense.log_softmax(1) - found.log_softmax(1))).sum()

    curvature = torch.autograd.functional.hessian(distance, dense)[0, :, 0] / 2
    generator = torch.Generator().manual_seed(0)
    found = objective(name).direction(dense.expand(200_000, -1), generator)
    assert (found.T @ found / len(found) - curvature).abs().max() < 0.01 * curvature.abs().max()


def scored(model: nn.Module, **options: Any) -> Scores:
    return spvit.score(model, images(model, 12), multiple=4, **options)


def headless(classes: int = 0) -> Any:
    model: Any = make_host("class_token")
    model.reset_classifier(classes)
    return randomise(model, seed=3).double().eval()


def values(scores: Scores) -> list[float]:
    return [value for block in scores.blocks for _, value in block.attention if value > 0]


def test_auto_is_logits_of_classes_the_output_of_one_logit_and_features_without_a_head() -> None:
    for classes, expected in ((7, "logits"), (1, "pooled"), (0, "features")):
        assert Objective.of("auto", Host.of(headless(classes))) == objective(expected)
    named = {name: values(scored(headless(), objective=name)) for name in ("pooled", "tokens", "auto")}
    assert len({tuple(own) for own in named.values()}) == 3
    own = spvit.score(headless(), images(headless(), 12), multiple=4, objective=torch.nn.Identity())
    assert values(own) == named["pooled"]
    assert own.objective == "function Identity"


def test_decide_passes_the_objective_on() -> None:
    host = make_host("class_token")
    x = images(host, 12)
    scores = spvit.score(host, x, objective="tokens")
    expected = spvit.decide(host, macs="60%", scores=scores)
    assert spvit.decide(host, macs="60%", calibration=x, objective="tokens") == expected


def mean_square(output: Tensor) -> float:
    return float(output.square().mean())


def test_objectives_that_do_not_work_are_refused() -> None:
    host = headless()
    with pytest.raises(
        CalibrationError, match=r"objective is 'patches', expected auto, .*, or a function of the model"
    ):
        scored(host, objective="patches")
    with pytest.raises(CalibrationError, match="objective, function mean_square, returned a float, expected a tensor"):
        scored(host, objective=mean_square)
    with pytest.raises(CalibrationError, match=r"returned a tensor \[\], expected a tensor \[images, ...\]"):
        scored(host, objective=torch.mean)
    with pytest.raises(DataError, match="objective is 'patches', expected auto or logits or"):
        spvit.CompressConfig(objective="patches")


def test_scores_remember_their_objective(tmp_path: Path) -> None:
    host = make_host("class_token")
    for name, other in (("tokens", "logits"), ("logits", "pooled")):
        scores = scored(host, objective=name)
        scores.save(tmp_path / name)
        loaded = Scores.load(tmp_path / name)
        assert loaded == scores
        for same in ("auto", name):
            loaded.check_objective(same)
        with pytest.raises(CalibrationError, match=f"by objective {name}, not {other}; leave the objective out"):
            spvit.decide(host, macs="60%", scores=loaded, objective=other)
