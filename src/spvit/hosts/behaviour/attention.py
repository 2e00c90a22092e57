"""Finds attention layers, the blocks around them, and what each projection of theirs is.

Shapes: B images, N tokens, T = B N, D width, C channels, H heads, E head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.errors import UnsupportedHostError
from spvit.hosts.behaviour.equations import CLOSE, columns_that_read, places_of, rows_that_make
from spvit.hosts.behaviour.watch import Call, Core, Pass, first_tensor
from spvit.hosts.calling import answers_changed
from spvit.hosts.position import core_alone, find_bias, rotations
from spvit.hosts.sites import PLAIN, Bias, Rotary, Rows


@dataclass(frozen=True)
class FoundLayer:
    """An attention layer that was found, and the block around it."""

    path: str
    block: str
    module: nn.Module
    core: Core
    call: Call
    out: Rows
    out_norm: str | None
    token_first: bool

    @property
    def tokens(self) -> Tensor:
        """What it takes, images first."""
        assert self.call.tokens is not None
        return self.call.tokens.transpose(0, 1) if self.token_first else self.call.tokens

    @property
    def arguments(self) -> dict[str, Any]:
        """What it was called with, by name."""
        return _arguments(self.module, self.call)


def attention_layers(seen: Pass) -> list[FoundLayer]:
    """Return the attention layers with a block of their own, in the order in which they ran."""
    ran = [*_stock_cores(seen), *seen.cores] if seen.declared is None else _declared_cores(seen)
    cores = [core for core in ran if core.query.shape == core.key.shape]
    cores.sort(key=lambda core: seen.calls[core.running[0]][0].order)
    if not cores:
        known = "; ".join(f"a softmax ran in {path or 'the model'}, but {why}" for path, why in seen.softmaxes.items())
        raise UnsupportedHostError(
            "no self-attention was found: neither fused attention nor a softmax of q k^T that is multiplied with "
            f"values ran in its forward pass{f' ({known})' if known else ''}"
        )
    owners = [core.running[0] for core in cores]
    blocks = [(core, _block_around(seen, core.running[0], owners)) for core in cores]
    layers = [_layer(seen, core, block) for core, block in blocks if block is not None]
    if not layers:
        raise UnsupportedHostError(
            f"attention runs in {owners[0]}, but no module around it holds an FFN too (two linear layers that ran; "
            "convolutions do not count); spvit prunes blocks of attention and FFN"
        )
    return layers


def _stock_cores(seen: Pass) -> Iterator[Core]:
    """Yield what ran inside nn.MultiheadAttention layers, which work on their tokens alone."""
    for path, module in seen.model.named_modules():
        if type(module) is not nn.MultiheadAttention or path not in seen.calls or module.in_proj_weight is None:
            continue
        named = _arguments(module, seen.calls[path][0])
        x = named["query"]
        extras = (named.get("attn_mask"), named.get("key_padding_mask"), module.bias_k)
        if named["key"] is not x or named["value"] is not x or x.dim() != 3 or any(item is not None for item in extras):
            continue
        packed = F.linear(x if module.batch_first else x.transpose(0, 1), module.in_proj_weight, module.in_proj_bias)
        query, key, value = packed.unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        yield _core(path, query, key, value, query.shape[-1] ** -0.5)


def _declared_cores(seen: Pass) -> Iterator[Core]:
    """Yield what attention computes in the layers that a user declares, if it is as declared."""
    declared = seen.declared
    assert declared is not None
    for path in declared.layers(seen.model):
        source = path if declared.norm is None else f"{path}.{declared.norm}"
        if source not in seen.calls:
            raise UnsupportedHostError(f"{source} does not run in a forward pass; name the layer that does")
        call = seen.calls[source][0]
        x = call.tokens if declared.norm is None else call.answer
        if x is None or x.dim() != 3:
            raise UnsupportedHostError(f"{source} takes no tokens [batch, tokens, width]")
        parts = declared.projected(path, seen.module(path), x.transpose(0, 1) if declared.token_first else x)
        yield _core(path, *parts, parts[0].shape[-1] ** -0.5 if declared.scale is None else declared.scale)


def _core(path: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Core:
    """Return the attention that a layer at a dotted name computes of these, [B, H, N, E] each."""
    ancestors = [path[:end] for end in range(len(path) - 1, 0, -1) if path[end] == "."]
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return Core((path, *ancestors), query, key, value, out, scale)


def _block_around(seen: Pass, owner: str, owners: list[str]) -> str | None:
    """Return the smallest module around attention that holds an FFN too; None if it holds other attention."""
    path = owner
    while path:
        path = path.rpartition(".")[0]
        if len({other for other in owners if f"{other}.".startswith(f"{path}.")}) > 1 or not path:
            return None
        child = owner[len(path) + 1 :].split(".")[0]
        linears = [name for name, module, _ in seen.inside(path) if isinstance(module, nn.Linear)]
        if sum(name.split(".")[0] != child for name in linears) >= 2:
            return path
    return None


def _layer(seen: Pass, core: Core, block: str) -> FoundLayer:
    """Return the layer of a core: the innermost module whose output is a projection of what all heads answer."""
    projections = []
    for path in core.running:
        if not path.startswith(f"{block}."):
            break
        call, module = seen.once(path), seen.module(path)
        answer = call.answer
        if answer is None or answer.dim() < 3:
            continue
        for split, rows, token_first in _answers(seen, core, path, answer):
            flat = split.output.transpose(1, 2).flatten(0, 1)  # [T, H, E]
            for name, part, own in seen.inside(path):
                if isinstance(part, nn.Linear) and own.tokens is not None and _are(own.tokens, flat):
                    projections.append(f"{path}.{name}")
            normed = [(name, out.view_as(flat)) for name, out in _normed(seen, path, flat.flatten(1))]
            for norm, outputs in [(None, flat), *normed]:
                out = columns_that_read(module, outputs, rows)
                if out is not None:
                    return FoundLayer(path, block, module, split, call, out, norm, token_first)
    behind = PLAIN
    if projections:
        behind = (
            f"found {projections[0]} behind the heads, but the layer answers something else than it: move what acts on "
            f"its output (a gate, LayerScale, the residual) out of the layer; if that is an adapter, {PLAIN}"
        )
    raise UnsupportedHostError(
        f"{core.running[0]}: no module around attention answers with a linear projection of what its heads return, "
        f"{list(core.output.shape)}; looked for output = W (heads side by side) + b; {behind}"
    )


def _answers(seen: Pass, core: Core, path: str, answer: Tensor) -> Iterator[tuple[Core, Tensor, bool]]:
    """Yield what a module answers as rows [T, D] in the order of a core's tokens, and whether tokens come first."""
    rows = answer.flatten(0, -2)
    split = core.split(len(rows))
    batch, count = split.output.shape[0], split.output.shape[2]
    if answer.dim() == 3 and answer.shape[:2] == (count, batch) and count != batch:
        yield split, answer.transpose(0, 1).flatten(0, 1), True
    elif len(rows) == batch * count:
        yield split, rows, False
    for _, made in seen.made_in(path):  # a layer that takes a map may cut it into windows inside
        split = core.split(len(made))
        if len(made) == split.output.shape[0] * count and made.shape[1] == rows.shape[1]:
            places = places_of(rows, made)
            if places is not None and -1 not in places:
                yield split, made, False


def _acting(seen: Pass, path: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield names inside a module, and what modules there take and answer, of one shape."""
    for name, _, call in seen.inside(path):
        if call.tokens is not None and call.answer is not None and call.answer.shape == call.tokens.shape:
            yield name, call.tokens, call.answer


def _are(given: Tensor, x: Tensor) -> bool:
    """Return whether a tensor holds the numbers of another, in its order."""
    return given.numel() == x.numel() and torch.equal(given.reshape(x.shape), x)


def _normed(seen: Pass, path: str, x: Tensor) -> list[tuple[str, Tensor]]:
    """Return names and flat outputs of modules in a layer that take x [T, C], and answer in its shape."""
    return [(name, answer.reshape(x.shape)) for name, given, answer in _acting(seen, path) if _are(given, x)]


def values_of(seen: Pass, layer: FoundLayer) -> tuple[Tensor, str | None, Rows]:
    """Return what a layer's projections get, [T, D], the norm in the layer that made it, and the values' rows."""
    given = layer.tokens.flatten(0, -2)
    want = layer.core.value.transpose(1, 2).flatten(0, 1)  # [T, H, E]
    candidates: list[tuple[str | None, Tensor]] = [(None, given), *_normed(seen, layer.path, given)]
    cut = (x for x, _ in seen.made_in(layer.path) if x.shape == (len(want), given.shape[1]))
    candidates += [(None, x) for x in cut if not torch.equal(x, given) and places_of(x, given) is not None]
    for name, x in candidates:
        found = rows_that_make(layer.module, x, want) if len(x) == len(want) else None
        if found is not None and abs(found[1] - 1) < 1e-3:
            return x, name, found[0]
    raise UnsupportedHostError(
        f"{layer.path}: its values are no linear map of its tokens by one of its parameters (v = x W^T + b); something "
        f"acts on them between; {PLAIN}"
    )


@dataclass(frozen=True)
class Logits:
    """What is known of how an attention layer makes its logits."""

    query: Rows | None
    key: Rows | None
    norms: tuple[str | None, str | None]
    factor: float
    """Of queries times keys, beside the scale that is seen."""
    rotary: Rotary | None = None
    bias: Bias | None = None
    cosine: bool = False
    """Whether queries and keys are scaled to length one."""
    explained: bool = False
    """Whether this is all that makes them."""


def logits_of(seen: Pass, own: nn.Module, layer: FoundLayer, x: Tensor, prefix: int) -> Logits:
    """Return what makes a layer's logits, x being what its projections get. own: the host's layer, not yet run."""
    core, arguments, bias = layer.core, layer.arguments, None
    if core.bias is not None:
        alone = partial(core_alone, layer.module, core.query.shape[2], x.shape[1], layer.token_first)
        bias = find_bias(layer.module, own, core.bias, core.query.shape[1], arguments, prefix, alone)

    def made_of(queries: Tensor, keys: Tensor, rotary: Rotary | None) -> Logits:
        query, query_norm, query_factor = _projection_of(seen, layer, x, queries)
        key, key_norm, key_factor = _projection_of(seen, layer, x, keys)
        explained = query is not None and key is not None and core.scale is not None
        explained = explained and (core.bias is None or bias is not None)
        return Logits(query, key, (query_norm, key_norm), query_factor * key_factor, rotary, bias, False, explained)

    plain = made_of(core.query, core.key, None)
    if plain.query is not None or plain.key is not None:
        return plain
    query, key = (_before_scaling(seen, layer, part) for part in (core.query, core.key))
    if query is not None and key is not None:
        return replace(made_of(query, key, None), cosine=True)
    found = rotations(own, core.query, core.key, arguments, prefix)
    turned = (made_of(queries, keys, rotary) for rotary, queries, keys in found)
    return next((logits for logits in turned if logits.query is not None and logits.key is not None), plain)


def _before_scaling(seen: Pass, layer: FoundLayer, unit: Tensor) -> Tensor | None:
    """Return the part of a linear map's output that queries or keys of length one [B, H, N, E] are made of."""
    batch, heads, tokens, width = unit.shape
    lengths = unit.norm(dim=-1)
    if not bool(((lengths - 1).abs().minimum(lengths) < CLOSE).all()):  # padding may be zeros
        return None
    want = unit.transpose(1, 2).flatten(0, 1)  # [T, H, E]
    for _, made in seen.made_in(layer.path):
        parts = made.shape[1] // (heads * width)
        if len(made) != len(want) or made.shape[1] != parts * heads * width:
            continue
        for split in (
            made.unflatten(1, (parts, heads, width)),
            made.unflatten(1, (heads, parts, width)).transpose(1, 2),
        ):
            for part in split.unbind(1):
                if torch.allclose(F.normalize(part, dim=-1), want, CLOSE, CLOSE):
                    return part.unflatten(0, (batch, tokens)).transpose(1, 2)
    return None


def _projection_of(seen: Pass, layer: FoundLayer, x: Tensor, want: Tensor) -> tuple[Rows | None, str | None, float]:
    """Return the rows that make queries or keys, the norm behind them, and a factor; no rows: unexplained.

    x: [T, D]; want: [B, H, N, E].
    """
    found = rows_that_make(layer.module, x, want.transpose(1, 2).flatten(0, 1))
    if found is not None:
        return found[0], None, found[1]
    for name, given, answer in _acting(seen, layer.path):
        for turned in (answer, answer.transpose(1, 2)) if answer.dim() == 4 else ():
            if turned.shape == want.shape and torch.allclose(turned, want, CLOSE, CLOSE):
                by_token = given if turned is not answer else given.transpose(1, 2)
                found = rows_that_make(layer.module, x, by_token.flatten(0, 1))
                if found is not None and abs(found[1] - 1) < 1e-3:
                    return found[0], name, 1.0
    return None, None, 1.0


def _arguments(module: nn.Module, call: Call) -> dict[str, Any]:
    return {**dict(zip(inspect.signature(module.forward).parameters, call.args)), **call.kwargs}


def parameters_of(layer: FoundLayer, inner_norm: str | None) -> tuple[str, ...]:
    """Return the names of what a layer's forward takes, where it is not simply called with tokens."""
    call = layer.call
    plain = len(call.args) == 1 or (len(call.args) == 2 and call.args[1] is None)
    if plain and inner_norm is None and not layer.token_first:
        return ()
    named = [
        parameter.name
        for parameter in inspect.signature(layer.module.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if not call.args:
        first = next(name for name, value in call.kwargs.items() if isinstance(value, Tensor))
        return (first, *(name for name in named if name != first))
    return tuple(named) or ("x",)


def norm_before(seen: Pass, layer: FoundLayer, call: Call | None, source: str | None) -> str | None:
    """Return the norm in the block that feeds the layer alone: with attention silent, its output must not matter.

    call: of the block; source: the module that made the layer's tokens, where they come in windows.
    """
    given = layer.call.given
    assert given is not None
    for name, module, own in seen.inside(layer.block):
        path, answered = f"{layer.block}.{name}", first_tensor(own.output)
        if answered is None or f"{path}.".startswith(f"{layer.path}.") or any(True for _ in module.children()):
            continue
        feeds = answered.shape == given.shape and answered.data_ptr() == given.data_ptr()
        if call is not None and (path == source or feeds):
            outputs = []
            for factor in (1.0, 2.0):
                with answers_changed({layer.module: torch.zeros_like, module: partial(torch.mul, other=factor)}):
                    outputs.append(first_tensor(call.again(seen.module(layer.block))))
            one, other = outputs
            return path if one is not None and other is not None and torch.equal(one, other) else None
    return None
