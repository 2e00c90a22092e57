"""Finds where the layers of any vision transformer are by running it, and verifies each finding numerically.

The model runs on a copy with slightly noisy weights, so that what training has not moved yet (tables and scales of
zeros) shows. Attention is where a softmax of products is multiplied with values; queries, keys, values and output are
told apart by equations; FFN units by halving one unit's rows, which must move exactly one input of the second layer;
tokens by changing corners of the images.

Shapes: B images, N tokens = P prefix tokens + G grid tokens (height x width, row-major), T = B N, D width, H heads, E
head width.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from spvit.cost import counted
from spvit.errors import UnsupportedHostError
from spvit.hosts.behaviour.attention import (
    FoundLayer,
    attention_layers,
    logits_of,
    norm_before,
    parameters_of,
    values_of,
)
from spvit.hosts.behaviour.ffn import find_ffn
from spvit.hosts.behaviour.tokens import Tokens, find_tokens
from spvit.hosts.behaviour.watch import Call, Pass, dropouts, first_tensor, watch
from spvit.hosts.behaviour.windows import check_answers, is_plain, layout_of
from spvit.hosts.declared import Sites
from spvit.hosts.found import FoundFamily
from spvit.hosts.gathered import Layout
from spvit.hosts.sites import AttentionSite, BlockSites

IMAGES = 3
NOISE = 0.05
SILENT = 1e-3
"""A parameter of this mean size or less, as layer scales before training, would hide what is behind it."""
HIDDEN = -1e4
"""A bias below it is a mask."""


def discover(model: nn.Module, size: tuple[int, int, int], declared: Sites | None = None) -> FoundFamily:
    """Return the family of a model for images of (channels, height, width), with every site found and verified.

    What a user declares of its layers is verified in place of what is seen of them.

    Raises:
        UnsupportedHostError: names the module, and what was looked for and found there.
    """
    twin = _noisy(model)
    weight = next(twin.parameters())
    images = torch.randn(IMAGES, *size, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        seen = watch(twin, images)
    except Exception as error:  # whatever a model raises for images that it does not take
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnsupportedHostError(
            f"its forward pass fails on images of {list(images.shape)} ({reason}); give images that it takes: "
            "spvit.recognise(model, images)"
        ) from error
    _check_used_once(twin, seen)
    seen.declared = declared
    layers = attention_layers(twin, seen)
    between = _chain(twin, seen, layers)
    macs = _macs_of(twin, size, [layer.path for layer in layers])
    tokens: list[Tokens] = []
    for layer, (before, _) in zip(layers, between):
        if not tokens or before is not None:
            silent = [other.path for other in layers[: len(tokens)]]
            tokens.append(find_tokens(twin, seen, images, layer.block, layer.token_first, silent))
        else:
            tokens.append(tokens[-1])
    sites = tuple(
        replace(_sites(model, twin, seen, layer, own, count), before=before, channels_first=channels_first)
        for layer, own, count, (before, channels_first) in zip(layers, tokens, macs, between)
    )
    return FoundFamily(type(model).__name__, sites, size, tokens[0].images, _classes(model, seen))


def _check_used_once(twin: nn.Module, seen: Pass) -> None:
    """Raise UnsupportedHostError when two places share a part with linear layers, which ran for each."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in twin.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module, (first, *others) in names.items():
        if not others:
            continue
        runs = [len(seen.calls.get(f"{first}.{name}".removesuffix("."), [])) for name, _ in module.named_modules()]
        if max(runs) > 1 and any(isinstance(part, nn.Linear) for part in module.modules()):
            raise UnsupportedHostError(
                f"{others[0]} and {first} are the same module, used twice; give each block weights of its own "
                "(copy.deepcopy the block)"
            )


def _noisy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, in single precision or better, whose parameters are a little random."""
    twin = copy.deepcopy(model).eval()
    if next(twin.parameters()).dtype in (torch.float16, torch.bfloat16):
        twin = twin.float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.nan_to_num_(0, 0, 0)  # what is not finite is said where images are computed
                size = float(parameter.square().mean().sqrt())
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(NOISE * (size if size > SILENT else 1) * noise)
    return twin


def _sites(model: nn.Module, twin: nn.Module, seen: Pass, layer: FoundLayer, tokens: Tokens, macs: int) -> BlockSites:
    """Return the sites of the block around an attention layer of a twin of the model. macs: of it, for one image."""
    module, core = twin.get_submodule(layer.path), layer.core
    batch, heads, count, width = core.value.shape
    windows = batch // IMAGES
    block_call = _call_of_block(twin, seen, layer.block)
    layout, source = _layout(twin, seen, layer, tokens, block_call)
    x, inner_norm, value = values_of(seen, module, layer)
    logits = logits_of(seen, module, model.get_submodule(layer.path), layer, x, tokens.prefix)
    known = logits.explained and core.query.shape == core.value.shape
    # Narrow attention takes tokens as they are, or in their windows.
    known = known and (windows == 1 if layout is None else layout.shape == (count,))
    plain = known and logits.norms == (None, None) and logits.bias is None
    attention_dropout, out_dropout = dropouts(module, layer.call)
    dim = x.shape[-1]
    if windows == 1 and core.bias is not None and bool(core.bias.min() < HIDDEN):
        raise UnsupportedHostError(
            f"{layer.path}: a mask hides tokens from each other (causal or local attention); a convolution would not"
        )
    site = AttentionSite(
        path=layer.path,
        norm=norm_before(twin, seen, layer, block_call, source),
        query=logits.query or value,
        key=logits.key or value,
        value=value,
        out=layer.out,
        dim=dim,
        heads=heads,
        head_width=width,
        prefix_tokens=tokens.prefix,
        grid=tokens.grid,
        keys=count,
        windows=windows,
        layout=layout,
        extra_macs=macs - windows * count * (4 * dim + 2 * count) * heads * width if macs else 0,
        narrows_queries=plain,
        narrows_values=known and layer.out_norm is None,
        scale=_exact((core.scale or 1.0) * logits.factor, (width, dim)),
        dropout=attention_dropout,
        out_dropout=out_dropout,
        norms=(*logits.norms, layer.out_norm),
        inner_norm=inner_norm,
        rotary=logits.rotary,
        bias=logits.bias,
        parameters=parameters_of(module, layer, inner_norm),
        tuple_items=len(layer.call.output) if isinstance(layer.call.output, (tuple, list)) else 0,
        token_first=layer.token_first,
    )
    return BlockSites(layer.block, site, find_ffn(twin, seen, layer.block, layer.path, dim))


def _exact(scale: float, widths: tuple[int, ...]) -> float:
    """Return the power of a width that a measured scale is but for rounding; the scale itself if it is none."""
    powers = [1.0, *(width**power for width in widths for power in (-0.5, -1.0, -0.25))]
    return next((power for power in powers if abs(scale - power) <= 1e-4 * power), scale)


def _call_of_block(twin: nn.Module, seen: Pass, block: str) -> Call | None:
    """Return the call of a block; None for a ModuleList, which is not called."""
    if isinstance(twin.get_submodule(block), nn.ModuleList):
        return None
    calls = seen.calls.get(block, [])
    if len(calls) != 1:
        raise UnsupportedHostError(f"{block} runs {len(calls)} times in a forward pass; expected once")
    return calls[0]


def _layout(
    twin: nn.Module, seen: Pass, layer: FoundLayer, tokens: Tokens, call: Call | None
) -> tuple[Layout | None, str | None]:
    """Return how a layer gets the tokens of its block, where not simply as they are, and the module that made them."""
    given, batch, count = layer.call.tokens, *layer.core.value.shape[::2][:2]
    assert given is not None
    found = layout_of(seen, layer.path, layer.block, IMAGES, tokens.prefix)
    if found is not None and call is not None and not is_plain(found[0], given, IMAGES):
        check_answers(twin, layer.path, twin.get_submodule(layer.block), call, found[0])
        return found
    shape = given.shape[1::-1] if layer.token_first else given.shape[:2]
    if given.dim() != 3 or shape != (IMAGES, tokens.count) or batch * count < IMAGES * tokens.count:
        raise UnsupportedHostError(
            f"{layer.path} attends to {count} tokens and takes a tensor {list(given.shape)}, but {tokens.count} tokens "
            "of an image enter its block; each must be in one window, and none merged or dropped"
        )
    return None, None


def _macs_of(twin: nn.Module, size: tuple[int, int, int], paths: list[str]) -> list[int]:
    """Return the MACs that some layers take for one image, with all that they run."""
    image = torch.zeros(1, *size, dtype=next(twin.parameters()).dtype, device="meta")
    try:
        counts = counted(twin, lambda meta: meta(image)).get_flop_counts()
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedHostError(
            f"its MACs cannot be counted on the meta device ({next(iter(str(error).splitlines()), '')}); let its "
            "forward make tensors on the device of the images, and not depend on their values"
        ) from error
    return [sum(counts.get(f"{type(twin).__name__}.{path}", {}).values()) // 2 for path in paths]


def _chain(twin: nn.Module, seen: Pass, layers: list[FoundLayer]) -> list[tuple[str | None, bool]]:
    """Return what stands before each block: nothing, or a module that takes what the block before it answers.

    And whether that module works on maps [B, D, height, width]. Raises UnsupportedHostError where anything else
    changes tokens between two blocks.
    """
    ends = [_ends(twin, seen, layer.block) for layer in layers]
    between: list[tuple[str | None, bool]] = [(None, False)]
    for before, after, (_, out), (given, _) in zip(layers, layers[1:], ends, ends[1:]):
        if _equal(out, given):
            between.append((None, False))
            continue
        found = _between(seen, out, given)
        if found is None:
            raise UnsupportedHostError(
                f"{after.block} takes tokens {list(given.shape)} that are not the output of {before.block}, "
                f"{list(out.shape)}, nor what one module makes of it; something changes them between these blocks"
            )
        between.append(found)
    return between


def _between(seen: Pass, out: Tensor, given: Tensor) -> tuple[str, bool] | None:
    """Return the module that makes what one block takes of what another answers, and whether on maps [B, D, h, w]."""
    for path, calls in seen.calls.items():
        pair = calls[0].tokens, calls[0].answer
        if len(calls) != 1 or pair[0] is None or pair[1] is None:
            continue
        if _equal(pair[0], out) and _equal(pair[1], given):
            return path, False
        if pair[0].dim() == pair[1].dim() == 4:
            source, target = (x.permute(0, 2, 3, 1).flatten(1, 5 - out.dim()) for x in pair if x is not None)
            if _equal(source, out) and _equal(target, given):
                return path, True
    return None


def _equal(one: Tensor | None, other: Tensor) -> bool:
    """Return whether two tensors are the same but for rounding."""
    if one is None or one.shape != other.shape:
        return False
    near = 1e-5 * float(other.abs().max())
    return torch.allclose(one[0], other[0], 1e-4, near) and torch.allclose(one, other, 1e-4, near)


def _ends(twin: nn.Module, seen: Pass, path: str) -> tuple[Tensor, Tensor]:
    """Return what a block takes and what it answers; a ModuleList adds each layer's output to the tokens."""
    block = twin.get_submodule(path)
    if not isinstance(block, nn.ModuleList):
        call = seen.calls[path][0]
        given, out = call.tokens, call.answer
    else:
        calls = [
            seen.calls[f"{path}.{name}"][0] for name, _ in block.named_children() if f"{path}.{name}" in seen.calls
        ]
        given = out = calls[0].tokens
        for own in calls:
            if (
                out is None
                or own.tokens is None
                or own.answer is None
                or not torch.allclose(out, own.tokens, atol=1e-5)
            ):
                raise UnsupportedHostError(
                    f"{path} is a ModuleList whose layers' outputs are not added to the tokens one after the other"
                )
            out = out + own.answer
    if given is None or out is None:
        raise UnsupportedHostError(f"{path} does not map tokens to tokens")
    return given, out


def _classes(model: nn.Module, seen: Pass) -> int:
    """Return how many classes a model tells apart: those of its logits, or of a linear layer that answers last."""
    logits = seen.output.get("logits") if isinstance(seen.output, dict) else getattr(seen.output, "logits", None)
    if isinstance(logits, Tensor):
        return logits.shape[-1] if logits.dim() == 2 else 0
    output = seen.output[0] if isinstance(seen.output, (tuple, list)) and seen.output else seen.output
    if not isinstance(output, Tensor) or output.dim() != 2:
        return 0
    said = getattr(model, "num_classes", None)
    if isinstance(said, int):
        return said if said == output.shape[-1] else 0
    linear = [path for path, calls in seen.calls.items() if isinstance(model.get_submodule(path), nn.Linear)]
    last = max(linear, key=lambda path: seen.calls[path][-1].order, default=None)
    made = None if last is None else first_tensor(seen.calls[last][-1].output)
    return output.shape[-1] if made is not None and made.data_ptr() == output.data_ptr() else 0
