"""Repair at pruning: every repaired layer is the regularised optimum on the pruned network's own inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
import spvit
from spvit.architecture import FFN, Architecture, Attention, Block, dense
from spvit.errors import CalibrationError
from spvit.hosts.host import Host
from spvit.hosts.sites import BlockSites
from spvit.hosts.weights import read_weights
from spvit.moments import RIDGE, WANTED_TOKENS
from spvit.repair.repair import changed
from spvit.replacements.bottleneck import LINEAR_SIDE
from spvit.replacements.narrow import JITTER, NarrowAttention
from spvit.surgery import prune_each
from tiny import (
    BOTH,
    EVERYTHING,
    WIDTH,
    assert_all_close,
    assert_close,
    assert_differ,
    ffn_widths,
    images,
    logits,
    make_host,
    make_net,
    with_kinds,
)

UNITS = (tuple(range(0, 72, 3)), tuple(range(40)), (5, 9, 70, 71), tuple(range(71)))
CALIBRATION = 16
SOME = ["class_token", "huggingface_options", "registers", "average_pooling", "no_biases", "residual_post_norm"]
NORMED = "options"  # LayerScale, and norms inside attention, which cannot be narrowed
ATTENTION = {
    "heads": Attention(heads=(0, 2)),
    "query_key_rank": Attention(query_key_rank=3),
    "value_rank": Attention(value_rank=3),
    "narrow": Attention(heads=(1, 2), query_key_rank=5, value_rank=4),
    "conv3": Attention("conv3"),
    "conv1": Attention("conv1"),
    "skip": Attention("skip"),
}


def architecture(*kept: Attention, units: tuple[tuple[int, ...], ...] = UNITS, **rules: str) -> Architecture:
    """Return an architecture whose four blocks keep these attentions and units in turn."""
    pairs = [(kept[index % len(kept)], units[index % len(units)]) for index in range(4)]
    return Architecture(tuple(Block(attention, FFN(WIDTH, own)) for attention, own in pairs), **rules)


WHOLE = (tuple(range(WIDTH)),)
MIXED = architecture(ATTENTION["narrow"], ATTENTION["conv3"], ATTENTION["skip"], ATTENTION["heads"], skip_rule="mean")


def seen(model: nn.Module, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input and the output of a module of a model that runs on images."""
    found: list[Tensor] = []

    def record(module: nn.Module, args: Any, out: Any) -> None:
        found.extend([args[0], out[0] if isinstance(out, tuple) else out])

    handle = model.get_submodule(path).register_forward_hook(record)
    logits(model, x)
    handle.remove()
    return found[0], found[1]


@torch.no_grad()
def wanted(model: nn.Module, host: nn.Module, sites: BlockSites, x: Tensor, ffn: bool = False) -> tuple[Tensor, Tensor]:
    """Return what the repaired attention (or FFN) of a block was to answer, and what that misses of the stream."""
    block = host.get_submodule(sites.path)
    if not ffn:
        return reference.attention_target(block, *(seen(network, sites.path, x)[0] for network in (host, model)))
    name = "mlp" if reference.post_norm(block) else "norm2" if hasattr(block, "norm2") else "layernorm_after"
    return reference.ffn_target(block, *(seen(network, f"{sites.path}.{name}", x)[0] for network in (host, model)))


def ridge(tokens: int, inputs: int) -> float:
    return RIDGE + 0.01 * max(0.0, WANTED_TOKENS * inputs / tokens - 1)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def check_optimum(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, level: float, prior: Tensor) -> None:
    """Check by brute force that no other weights near or far have a lower regularised loss."""
    generator = torch.Generator().manual_seed(0)
    zero = weight.new_zeros(len(weight))
    best = reference.ridge_loss(x, y, weight, zero if bias is None else bias, level, prior)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(4):
            step = size * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            assert reference.ridge_loss(x, y, weight + step, zero if bias is None else bias, level, prior) > best
            if bias is not None:
                assert reference.ridge_loss(x, y, weight, bias + step[:, 0], level, prior) > best
                moved = bias - step @ x.mean(0)
                assert reference.ridge_loss(x, y, weight + step, moved, level, prior) > best


def check_linear(model: nn.Module, host: nn.Module, sites: BlockSites, units: tuple[int, ...], x: Tensor) -> None:
    """Check an FFN's second layer: W + ridge of what is wanted less what W gives, on its own inputs."""
    linear, own = model.get_submodule(sites.ffn.second), host.get_submodule(sites.ffn.second)
    arriving, biased = seen(model, sites.ffn.second, x)[0], own.bias is not None
    answer = reference.mended_target(arriving, *wanted(model, host, sites, x, ffn=True), biased)
    hidden, target = reference.flat(arriving, answer)
    prior = own.weight[:, list(units)].detach()
    error = target - hidden @ prior.T - (own.bias.detach() if biased else 0)
    strength = ridge(len(hidden), len(units))
    weight, bias = reference.ridge_fit(hidden, error, strength, biased)
    close(linear.weight, prior + weight)
    if biased:
        close(linear.bias, own.bias + bias)
    new_bias = linear.bias.detach() if biased else None
    level = reference.penalty(hidden, strength, biased)
    check_optimum(hidden, target, linear.weight.detach(), new_bias, level, prior)


def best_product(queries: Tensor, keys: Tensor, rank: int) -> Tensor:
    """Return the M of a rank with which q^T M k is nearest to q^T k, by symmetric roots of the two second moments."""
    roots = []
    for vectors in (queries, keys):
        moment = vectors.T @ vectors / len(vectors)
        moment = moment + JITTER * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
        values, basis = torch.linalg.eigh(moment)
        roots.append(basis @ torch.diag(values.sqrt()) @ basis.T)
    left, values, right = torch.linalg.svd(roots[0] @ roots[1])
    cut = left[:, :rank] * values[:rank] @ right[:rank]
    return torch.linalg.solve(roots[0], cut) @ torch.linalg.inv(roots[1])


def check_narrow(model: nn.Module, host: nn.Module, sites: BlockSites, kept: Attention, x: Tensor) -> None:
    """Check queries and keys, values, and the output projection of narrow attention, each by its own formula."""
    path, found = sites.attention.path, model.get_submodule(sites.attention.path)
    assert isinstance(found, NarrowAttention)
    layer = read_weights(host.get_submodule(path), sites.attention)
    arriving = seen(model, path, x)[0]
    (tokens,) = reference.flat(arriving)
    heads = list(kept.heads or range(3))
    sizes = [found.heads * found.query_key_rank] * 2 + [found.heads * found.value_rank]
    split = [part.detach().unflatten(0, (found.heads, -1)) for part in found.qkv.weight.split(sizes)]
    biased = found.qkv.bias is not None
    biases = [part.detach().unflatten(0, (found.heads, -1)) for part in found.qkv.bias.split(sizes)] if biased else None
    narrow = SimpleNamespace(scale=sites.attention.scale)
    for index, name in enumerate(("query", "key", "value")):
        setattr(narrow, f"{name}_weight", split[index])
        setattr(narrow, f"{name}_bias", biases[index] if biases is not None else None)

    for index, head in enumerate(heads):
        queries, keys = (
            tokens @ weight[head].T + (bias[head] if bias is not None else 0)
            for weight, bias in ((layer.query_weight, layer.query_bias), (layer.key_weight, layer.key_bias))
        )
        parts = [tokens @ split[place][index].T + (biases[place][index] if biased else 0) for place in (0, 1)]
        product = torch.eye(queries.shape[1], dtype=queries.dtype)
        if kept.query_key_rank is not None:
            product = best_product(queries.detach(), keys.detach(), kept.query_key_rank)
        close(parts[0] @ parts[1].T, (queries @ product @ keys.T).detach(), 1e-7)

    out = reference.heads_out(arriving, narrow)
    prior, predicting = layer.out_weight.detach()[:, heads], out
    if kept.value_rank is not None:
        whole = SimpleNamespace(**vars(narrow))
        whole.value_weight = layer.value_weight.detach()[heads]
        whole.value_bias = None if layer.value_bias is None else layer.value_bias.detach()[heads]
        predicting = outputs = reference.heads_out(arriving, whole)
        priors = []
        for index in range(len(heads)):
            (own,) = reference.flat(outputs[:, :, index])
            projection, value_weight = prior[:, index], whole.value_weight[index]
            covariance = torch.cov(own.T, correction=0)
            jitter = JITTER * covariance.diagonal().mean()
            root = covariance + jitter * torch.eye(len(covariance), dtype=covariance.dtype)
            # The kept directions span the leading ones of P C P^T, seen from the values: U^T P W_v.
            leading = torch.linalg.eigh(projection @ root @ projection.T).eigenvectors[:, -kept.value_rank :]
            span = torch.linalg.qr((leading.T @ projection @ value_weight).T).Q
            close(narrow.value_weight[index] @ span @ span.T, narrow.value_weight[index], 1e-6)
            rotation = torch.linalg.lstsq(value_weight.T, narrow.value_weight[index].T).solution.T
            inner = rotation @ covariance @ rotation.T
            inner = inner + JITTER * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype)
            priors.append(torch.linalg.solve(inner, rotation @ covariance @ projection.T).T)
        prior = torch.stack(priors, dim=1)
    out_biased = layer.out_bias is not None
    answer = reference.mended_target(predicting.flatten(2), *wanted(model, host, sites, x), out_biased)
    out, target = reference.flat(out.flatten(2), answer)
    prior = prior.flatten(1)
    strength = ridge(len(out), out.shape[1])
    weight, bias = reference.ridge_fit(out, target - out @ prior.T, strength, out_biased)
    close(found.proj.weight, prior + weight, 1e-7)
    if out_biased:
        close(found.proj.bias, bias, 1e-7)
    level = reference.penalty(out, strength, out_biased)
    new_bias = found.proj.bias.detach() if out_biased else None
    check_optimum(out, target, found.proj.weight.detach(), new_bias, level, prior)


def check_convolution(model: nn.Module, host: nn.Module, sites: BlockSites, x: Tensor) -> None:
    """Check that the two linear maps are the reduced-rank ridge regression, and where ReLU stands."""
    site, layer = sites.attention, model.get_submodule(sites.attention.path)
    arriving, target = seen(model, site.path, x)[0], wanted(model, host, sites, x)
    prefix = site.prefix_tokens
    tokens = arriving[:, prefix:]
    if layer.conv_in.weight.dim() == 4:
        tokens = reference.im2col(tokens, site.grid)
    answer = reference.mended_target(tokens, *(part[:, prefix:] for part in target))
    inputs, outputs = reference.flat(tokens, answer)
    expected, bias = reference.low_rank_ridge_fit(inputs, outputs, ridge(len(inputs), inputs.shape[1]), site.head_width)
    scale = layer.bn.weight / torch.sqrt(layer.bn.running_var + layer.bn.eps)
    inward = layer.conv_in.weight.detach().flatten(1)
    close(layer.conv_out.weight * scale @ inward, expected, 1e-7)
    shift = layer.bn.bias + (layer.conv_in.bias - layer.bn.running_mean) * scale
    close(layer.conv_out.bias + layer.conv_out.weight @ shift, bias, 1e-7)
    hidden = inputs @ inward.T * scale + shift
    close(hidden.mean(0), torch.full_like(hidden[0], LINEAR_SIDE), 1e-6)
    close(hidden.std(0, correction=0), torch.ones_like(hidden[0]), 1e-2)
    out = layer(arriving)
    out = out[0] if isinstance(out, tuple) else out
    linear = (hidden > 0).all(1)
    assert linear.double().mean() > 0.95
    close(out[:, prefix:].flatten(0, 1)[linear], (inputs @ expected.T + bias)[linear], 1e-6)
    if prefix:
        answer = reference.mended_target(arriving[:, :prefix], *(part[:, :prefix] for part in target))
        check_prefix(layer.prefix, arriving[:, :prefix], answer, out[:, :prefix], site.head_width)


def check_prefix(module: nn.Module, arriving: Tensor, target: Tensor, out: Tensor, rank: int) -> None:
    if isinstance(module, nn.Identity):
        assert torch.equal(out, arriving)
        return
    inputs, outputs = reference.flat(arriving, target)
    expected, bias = reference.low_rank_ridge_fit(inputs, outputs, ridge(len(inputs), inputs.shape[1]), rank)
    close(out, arriving @ expected.T + bias, 1e-7)


def check(model: nn.Module, host: nn.Module, kept: Architecture, x: Tensor) -> None:
    """Check every layer that pruning changed, and every FFN behind one."""
    behind = False
    for sites, block in zip(Host.of(host).blocks, kept.blocks):
        path = sites.attention.path
        if block.attention.kind in ("conv3", "conv1"):
            check_convolution(model, host, sites, x)
        elif block.attention.kind == "skip":
            target = sum(wanted(model, host, sites, x))
            prefix = sites.attention.prefix_tokens
            grid_mean = target[:, prefix:].mean((0, 1), keepdim=True).expand_as(target[:1, prefix:])
            means = torch.cat([target[:, :prefix].mean(0, keepdim=True), grid_mean], dim=1)
            close(seen(model, path, x)[1], means.expand_as(target))
        elif block.attention.narrowed():
            check_narrow(model, host, sites, block.attention, x)
        behind = behind or changed(block)
        if behind:
            check_linear(model, host, sites, block.ffn.units, x)


@pytest.mark.parametrize("name", [*SOME, NORMED])
def test_every_repaired_layer_is_the_regularised_optimum(name: str) -> None:
    host = make_host(name)
    x = images(host, CALIBRATION)
    kept = architecture(*map(Attention, ("conv1", "conv3", "skip", "msa")), skip_rule="mean")
    kept = kept if name == NORMED else MIXED
    check(spvit.prune(host, kept, repair=x), host, kept, x)


@pytest.mark.parametrize("kind", ATTENTION)
def test_every_kind_is_repaired_behind_every_other(kind: str) -> None:
    host = make_host("class_token")
    x = images(host, CALIBRATION)
    kept = architecture(ATTENTION["conv1"], ATTENTION[kind], ATTENTION["narrow"], ATTENTION[kind], skip_rule="mean")
    check(spvit.prune(host, kept, repair=x), host, kept, x)


@pytest.mark.parametrize("name", ["class_token", "registers", "average_pooling", "huggingface"])
@pytest.mark.parametrize("rule", ["identity", "linear"])
def test_prefix_tokens_follow_the_rule_of_the_architecture(rule: str, name: str) -> None:
    host = make_host(name)
    x = images(host, CALIBRATION)
    kept = architecture(Attention("conv3"), Attention("conv1"), units=WHOLE, prefix_rule=rule)
    check(spvit.prune(host, kept, repair=x), host, kept, x)


@pytest.mark.parametrize("name", BOTH)
def test_ffn_units_are_repaired_by_the_published_formula(name: str) -> None:
    host = make_host(name)
    x = images(host, CALIBRATION)
    sites = Host.of(host).blocks[0].ffn
    kept = list(UNITS[0])
    removed = [unit for unit in range(WIDTH) if unit not in kept]
    (hidden,) = reference.flat(seen(host, sites.second, x)[0])
    mean, covariance = hidden.mean(0), torch.cov(hidden.T, correction=0)
    inner = covariance[kept][:, kept]
    inner = inner + RIDGE * inner.diagonal().mean() * torch.eye(len(kept), dtype=inner.dtype)
    b = torch.linalg.solve(inner, covariance[kept][:, removed]).T  # S_PK (S_KK + lambda I)^-1
    c = mean[removed] - b @ mean[kept]
    second = host.get_submodule(sites.second)
    found = spvit.prune(host, architecture(Attention()), repair=x).get_submodule(sites.second)
    close(found.weight, second.weight[:, kept] + second.weight[:, removed] @ b)
    close(found.bias, second.bias + second.weight[:, removed] @ c)


@pytest.mark.parametrize("name", ["class_token", "no_biases"])
def test_emptied_ffns_leave_their_mean_if_there_is_a_bias_for_it(name: str) -> None:
    host = make_host(name)
    x = images(host, CALIBRATION)
    found = spvit.prune(host, architecture(Attention(), units=((), *WHOLE * 3)), repair=x).blocks[0].mlp.fc2
    assert found.weight.shape == (24, 0)
    if name == "class_token":
        close(found.bias, seen(host, "blocks.0.mlp.fc2", x)[1].mean((0, 1)))
    else:
        assert found.bias is None


def test_what_pruning_leaves_whole_keeps_its_weights_bit_for_bit() -> None:
    host = make_host("class_token")
    kept = architecture(Attention(), Attention("conv1"), Attention(), ATTENTION["narrow"], units=WHOLE)
    kept = Architecture((*kept.blocks[:2], Block(Attention(), FFN(WIDTH, (1, 2, 3))), kept.blocks[3]))
    state, own = spvit.prune(host, kept, repair=images(host, CALIBRATION)).state_dict(), host.state_dict()
    behind = tuple(f"blocks.{index}.mlp.fc2" for index in (1, 2, 3))
    for key, value in own.items():
        if key.startswith(("blocks.1.attn.", "blocks.3.attn.", "blocks.2.mlp.fc1", *behind)):
            continue
        assert torch.equal(state[key], value), key
    for key in ("blocks.2.mlp.fc1.weight", "blocks.2.mlp.fc1.bias"):
        assert torch.equal(state[key], own[key][[1, 2, 3]])
    for path in behind:
        assert_differ(state[f"{path}.bias"], own[f"{path}.bias"])


def test_repair_aims_at_the_searched_weights() -> None:
    host, net = make_net("class_token")
    x = images(host, CALIBRATION)
    kept = architecture(ATTENTION["narrow"], Attention("conv1"))
    model = spvit.prune(host, kept, weights=net, repair=x)
    searched = copy.deepcopy(host)
    searched.load_state_dict(spvit.prune(host, EVERYTHING, weights=net).state_dict())
    check(model, searched, kept, x)
    assert_differ(logits(model, x), logits(spvit.prune(host, kept, repair=x), x))


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "batches": lambda x: list(x.split(5)),
    "a generator": lambda x: (batch for batch in x.split(7)),
    "a loader with labels": lambda x: [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in x.split(8)],
    "lists": lambda x: [[batch, None] for batch in x.split(9)],
    "an empty batch": lambda x: [x[:0], *x.split(9)],
    "another precision": lambda x: x.float(),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_come_in_any_form(form: str) -> None:
    host = make_host("class_token")
    x = images(host, CALIBRATION).float().double()
    expected = spvit.prune(host, MIXED, repair=x).state_dict()
    found = spvit.prune(host, MIXED, repair=FORMS[form](x)).state_dict()
    for key, value in expected.items():
        if value.is_floating_point():
            close(found[key], value, 1e-5) if "conv" in key else assert_close(found[key], value, scale=1e3)


@pytest.mark.parametrize("name", BOTH)
def test_flags_survive_and_count_for_nothing(name: str) -> None:
    blocks = {"class_token": "blocks", "huggingface": "vit.layers"}[name]
    host = make_host(name)
    x = images(host, CALIBRATION)
    expected = spvit.prune(host, MIXED, repair=x).state_dict()
    for module in host.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    host.train()
    host.get_submodule(f"{blocks}.0").eval()
    host.get_submodule(f"{blocks}.1").requires_grad_(False)
    before = copy.deepcopy(host.state_dict())
    model = spvit.prune(host, MIXED, repair=x)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())
    assert all(torch.equal(host.state_dict()[key], value) for key, value in before.items())
    for module_name, module in model.named_modules():
        assert module.training == (not f"{module_name}.".startswith(f"{blocks}.0.")), module_name
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not parameter_name.startswith(f"{blocks}.1.")), parameter_name
        assert parameter.is_leaf
    assert spvit.prune(host, MIXED, repair=x, inplace=True) is host
    assert all(torch.equal(host.state_dict()[key], value) for key, value in expected.items())


@pytest.mark.parametrize("constant", ["images", "everything"])
def test_constant_activations_are_repaired_to_finite_weights(constant: str) -> None:
    host = make_host("class_token", torch.float32)
    if constant == "everything":
        with torch.no_grad():
            host.pos_embed.zero_()
            host.cls_token.zero_()
            host.patch_embed.proj.bias.fill_(0.3)
    x = torch.zeros(8, 3, 64, 64)
    kept = architecture(*ATTENTION.values(), prefix_rule="linear", skip_rule="mean")
    for some in (kept, Architecture(kept.blocks[::-1], kept.prefix_rule, kept.skip_rule)):
        model = spvit.prune(host, some, repair=x)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        error = (logits(model, x) - logits(host, x)).abs().max()
        assert error < 0.2 * logits(host, x).abs().max()  # one image is remembered


def test_heads_whose_outputs_have_few_directions_are_narrowed() -> None:
    host = make_host("class_token", torch.float32)
    with torch.no_grad():
        for block in host.blocks:
            block.attn.qkv.weight[:24].zero_()  # all attend evenly: one output an image
            block.attn.qkv.bias[:24].zero_()
    x = images(host, 3)
    model = spvit.prune(host, architecture(Attention(query_key_rank=2, value_rank=4), units=WHOLE), repair=x)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert (logits(model, x) - logits(host, x)).abs().max() < 0.05 * logits(host, x).abs().max()


@pytest.mark.parametrize("name", ["class_token", "huggingface"])
def test_a_first_ffn_with_fewer_units_misses_nothing_but_these(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host, seen = make_host(name), []
    monkeypatch.setattr("spvit.repair.repair.mean", lambda excess: seen.append(list(excess)) or 0.0)
    spvit.prune(host, architecture(Attention(), units=UNITS), repair=images(host, 32))
    assert seen[0][0] == 0.0  # rounding is nothing that more images would tell
    assert seen[0][1] != 0.0


NOT_FINITE = "the activations of the calibration images are not finite; check the model's weights and the images"


@pytest.mark.parametrize("name", ["class_token", "huggingface_options"])
@pytest.mark.parametrize("second", ["conv3", "narrow"])
def test_a_repair_that_was_cut_short_goes_on_to_the_same_weights(name: str, second: str) -> None:
    host = make_host(name)
    kept = architecture(Attention(), ATTENTION[second], ATTENTION["skip"], ATTENTION["heads"], units=(*WHOLE, *UNITS))
    x, finished = images(host, 32), {}

    def cut(phase: str, done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    torch.manual_seed(1)
    whole = spvit.prune(host, kept, repair=x)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        spvit.prune(host, kept, repair=x, report=cut, finished=finished)
    assert list(finished) == [1]  # the first block is whole
    for images_left in (x, ()):  # at last all blocks are finished, which takes no images
        torch.manual_seed(1)
        continued = spvit.prune(host, kept, repair=images_left, finished=finished)
        for key, value in whole.state_dict().items():
            assert torch.equal(continued.state_dict()[key], value), key


@pytest.mark.parametrize("kept", [Attention(heads=(0,)), Attention("conv3"), Attention("skip")], ids=str)
def test_activations_that_are_not_finite_are_refused(kept: Attention) -> None:
    host = make_host("class_token")
    host.blocks[1].attn.proj.weight.data[3, 3] = float("nan")
    with pytest.raises(CalibrationError, match=NOT_FINITE):
        spvit.prune(host, architecture(Attention(), kept, units=WHOLE, skip_rule="mean"), repair=images(host, 8))


BAD_IMAGES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "none": (lambda x: x[:0], "there are no calibration images; give a few hundred or more"),
    "no batches": (lambda x: [], "there are no calibration images; give a few hundred or more"),
    "another size": (
        lambda x: x[..., :32],
        r"calibration images are \[3, 64, 32\], expected tensors of \[batch, 3, 64, 64\]",
    ),
    "one image": (lambda x: [x[0]], r"calibration images are \[64, 64\], expected tensors"),
    "grey": (lambda x: x[:, :1], r"calibration images are \[1, 64, 64\], expected tensors of .* as the model takes"),
    "words": (lambda x: ["cat.png"], "calibration images are str, expected tensors"),
    "a late batch": (lambda x: [x, x[..., 1:]], r"calibration images are \[3, 64, 63\]"),
    "not finite": (
        lambda x: torch.cat([x, torch.full_like(x[:1], float("nan"))]),
        "calibration images hold values that are not finite; check how they are read",
    ),
}


@pytest.mark.parametrize("bad", BAD_IMAGES)
def test_images_that_do_not_fit_are_refused(bad: str) -> None:
    make, message = BAD_IMAGES[bad]
    host = make_host("class_token").train()
    before = copy.deepcopy(host.state_dict())
    with pytest.raises(CalibrationError, match=message):
        spvit.prune(host, MIXED, repair=make(images(host, 4)))
    assert all(torch.equal(host.state_dict()[key], value) for key, value in before.items())
    assert all(module.training for module in host.modules())


@pytest.mark.parametrize(
    ("kept", "units", "message"),
    [
        (
            Attention(),
            UNITS[3],
            "17 calibration tokens are too few for a layer of 71 inputs: at least 18 are needed, 284 ",
        ),
        (
            Attention("conv3"),
            WHOLE[0],
            "16 calibration tokens .* of 216 inputs: at least 54 are needed, 864 or more are",
        ),
    ],
)
def test_too_few_images_are_refused_with_how_many_are_needed(
    kept: Attention, units: tuple[int, ...], message: str
) -> None:
    host = make_host("class_token")
    with pytest.raises(CalibrationError, match=message):
        spvit.prune(host, architecture(kept, units=(units,)), repair=images(host, 1))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator is at hand")
def test_decision_and_repair_on_an_accelerator_are_those_of_the_cpu() -> None:
    host = make_host("class_token", torch.float32)
    x, device = images(host, 48), torch.accelerator.current_accelerator()
    there = copy.deepcopy(host).to(device)
    architecture = spvit.decide(host, macs="50%", calibration=x)
    assert spvit.decide(there, macs="50%", calibration=x) == architecture
    expected = spvit.prune(host, architecture, repair=x)
    found = spvit.prune(there, architecture, repair=x)
    assert {parameter.device.type for parameter in found.parameters()} == {device.type}
    assert_close(logits(found.cpu(), x), logits(expected, x))


@pytest.mark.parametrize("name", ["class_token", "huggingface", "swin_padded"])
def test_networks_that_are_repaired_side_by_side_are_as_if_alone(name: str) -> None:
    model = make_host(name)
    host, x, whole = spvit.recognise(model), images(model, 24), dense(ffn_widths(model))
    late = (*whole.blocks[:-1], replace(whole.blocks[-1], ffn=FFN(ffn_widths(model)[-1], (0, 3))))
    half = tuple(
        replace(block, ffn=FFN(block.ffn.width, tuple(range(0, block.ffn.width, 2)))) for block in whole.blocks
    )
    narrow = tuple(replace(block, attention=Attention(heads=(0, 2), value_rank=4)) for block in half)
    architectures = [
        with_kinds(whole, "conv3", "skip", "conv1", "msa"),
        *(replace(whole, blocks=blocks) for blocks in (late, half, narrow)),
    ]
    alone = [spvit.prune(host, architecture, repair=x) for architecture in architectures]
    reports: list[int] = []
    found = prune_each(host, architectures, x, lambda name, done, *rest: reports.append(done))
    assert reports == [1, 2, 3, 4]
    for own, other in zip(found, alone):
        states = (
            {key: value for key, value in each.state_dict().items() if "num_" not in key} for each in (own, other)
        )
        assert_all_close(*states)
