"""Finds where the layers of any vision transformer are by running it, and verifies each finding numerically.

The model runs on a copy with slightly noisy weights, so that what training has not moved yet (tables and scales of
zeros) shows. Attention is where a softmax of products is multiplied with values; queries, keys, values and output are
told apart by equations; FFN units by halving one unit's rows, which must move exactly one input of the second layer;
tokens by changing corners of the images. In the end the whole model runs with half of all units.

Shapes: B images, N tokens = P prefix tokens + G grid tokens (height x width, row-major), D width, H heads, E head
width.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

from spvit.cost import counted
from spvit.errors import UnsupportedHostError, first_line
from spvit.hosts.behaviour.attention import (
    FoundLayer,
    attention_layers,
    logits_of,
    norm_before,
    parameters_of,
    values_of,
)
from spvit.hosts.behaviour.ffn import check_narrower, find_ffn
from spvit.hosts.behaviour.tokens import Tokens, find_tokens, layout_of
from spvit.hosts.behaviour.watch import Pass, dropouts, first_tensor, same, watch
from spvit.hosts.calling import calls_of
from spvit.hosts.declared import Sites
from spvit.hosts.family import Family
from spvit.hosts.position import core_alone
from spvit.hosts.sites import AttentionSite, BlockSites

IMAGES = 3
NOISE = 0.05
SILENT = 1e-3
"""A parameter of this mean size or less, as layer scales before training, would hide what is behind it."""
HIDDEN = -1e4
"""A bias below it is a mask."""


@torch.no_grad()
def discover(model: nn.Module, size: tuple[int, int, int], declared: Sites | None = None) -> Family:
    """Return the family of a model for images of (channels, height, width), with every site found and verified.

    What a user declares of its layers is verified in place of what is seen of them.

    Raises:
        UnsupportedHostError: names the module, and what was looked for and found there.
    """
    twin = _noisy(model)
    images = torch.randn(IMAGES, *size, generator=torch.Generator().manual_seed(0)).to(next(twin.parameters()))
    try:
        seen = watch(twin, images)
    except Exception as error:  # whatever a model raises for images that it does not take
        raise UnsupportedHostError(
            f"its forward pass fails on images of {list(images.shape)} ({first_line(error)}); give images that it "
            "takes: spvit.recognise(model, images)"
        ) from error
    _check_used_once(seen)
    seen.declared = declared
    layers = attention_layers(seen)
    paths = [layer.path for layer in layers]
    between = [(None, False), *(_between(seen, *pair) for pair in pairwise(layers))]
    blocks: list[BlockSites] = []
    tokens = find_tokens(seen, images, layers[0], [])
    for index, (layer, macs, (before, channels_first)) in enumerate(zip(layers, _macs_of(twin, size, paths), between)):
        if before is not None:
            tokens = find_tokens(seen, images, layer, paths[:index])
        site = _site(model, seen, layer, tokens, macs)
        ffn = find_ffn(seen, layer.block, layer.path, site.dim)
        blocks.append(BlockSites(layer.block, site, ffn, before, channels_first))
    check_narrower(twin, images, [block.ffn for block in blocks])
    calls_of(twin, blocks, size)  # raises where a block reads something of each image beside its tokens
    return Family(type(model).__name__, tuple(blocks), size, tokens.images, _classes(model, seen))


def _check_used_once(seen: Pass) -> None:
    """Raise UnsupportedHostError when two places share a part with linear layers, which ran for each."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in seen.model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module, (first, *others) in names.items():
        runs = [len(seen.calls.get(f"{first}.{name}".removesuffix("."), [])) for name, _ in module.named_modules()]
        if others and max(runs) > 1 and any(isinstance(part, nn.Linear) for part in module.modules()):
            raise used_twice(others[0], first)


def used_twice(one: str, other: str) -> UnsupportedHostError:
    """Return what is wrong with a module at two dotted names, which cannot become two different things."""
    return UnsupportedHostError(
        f"{one} and {other} are the same module, used twice; give each block weights of its own (copy.deepcopy the "
        "block)"
    )


def _noisy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, in single precision or better, whose parameters are a little random."""
    twin = copy.deepcopy(model).eval()
    if next(twin.parameters()).dtype in (torch.float16, torch.bfloat16):
        twin = twin.float()
    generator = torch.Generator().manual_seed(1)
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.nan_to_num_(0, 0, 0)  # what is not finite is said where images are computed
            size = float(parameter.square().mean().sqrt())
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(NOISE * (size if size > SILENT else 1) * noise)
    return twin


def _site(model: nn.Module, seen: Pass, layer: FoundLayer, tokens: Tokens, macs: int) -> AttentionSite:
    """Return the site of an attention layer of a twin of the model. macs: of it, for one image."""
    core, listed = layer.core, isinstance(seen.module(layer.block), nn.ModuleList)
    batch, heads, count, width = core.value.shape
    windows = batch // IMAGES
    call = None if listed else seen.once(layer.block)
    layout, source = layout_of(seen, layer, tokens, call, IMAGES)
    x, inner_norm, value = values_of(seen, layer)
    logits = logits_of(seen, model.get_submodule(layer.path), layer, x, tokens.prefix)
    known = logits.explained and core.query.shape == core.value.shape
    # Narrow attention takes tokens as they are, or in their windows.
    known = known and (windows == 1 if layout is None else layout.shape == (count,))
    attention_dropout, out_dropout = dropouts(layer.module, layer.path, layer.call)
    dim = x.shape[-1]
    scale, exact = _exact((core.scale or 1.0) * logits.factor, (width, dim))
    learned = core.scales is not None
    if known and (learned or (not exact and abs(logits.factor - 1) < 1e-3)):
        alone = core_alone(model.get_submodule(layer.path), count, dim, layer.token_first)
        known = alone is not None  # for what a layer has learned is read from it at work
        # The twin's parameters are a little random, so what differs there is a parameter.
        learned = learned or (alone is not None and abs((alone.scale or 0) - scale) > 1e-4 * abs(scale))
    if windows == 1 and core.bias is not None and bool(core.bias.min() < HIDDEN):
        raise UnsupportedHostError(
            f"{layer.path}: a mask hides tokens from each other (causal or local attention); a convolution would not"
        )
    return AttentionSite(
        path=layer.path,
        norm=norm_before(seen, layer, call, source),
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
        narrows_queries=known and logits.norms == (None, None) and logits.bias is None and not logits.cosine,
        narrows_values=known and layer.out_norm is None,
        scale=1.0 if learned else scale,
        dropout=attention_dropout,
        out_dropout=out_dropout,
        norms=(*logits.norms, layer.out_norm),
        inner_norm=inner_norm,
        cosine=logits.cosine,
        head_scales=learned,
        rotary=logits.rotary,
        bias=logits.bias,
        parameters=parameters_of(layer, inner_norm),
        tuple_items=len(layer.call.output) if isinstance(layer.call.output, (tuple, list)) else 0,
        token_first=layer.token_first,
    )


def _exact(scale: float, widths: tuple[int, ...]) -> tuple[float, bool]:
    """Return the power of a width that a measured scale is but for rounding, and True; or the scale itself."""
    powers = [1.0, *(width**power for width in widths for power in (-0.5, -1.0, -0.25))]
    found = next((power for power in powers if abs(scale - power) <= 1e-4 * power), None)
    return (scale, False) if found is None else (found, True)


def _macs_of(twin: nn.Module, size: tuple[int, int, int], paths: list[str]) -> list[int]:
    """Return the MACs that some layers take for one image, with all that they run."""
    image = torch.zeros(1, *size, dtype=next(twin.parameters()).dtype, device="meta")
    try:
        counts = counted(twin, lambda meta: meta(image)).get_flop_counts()
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedHostError(
            f"its MACs cannot be counted on the meta device ({first_line(error)}); let its "
            "forward make tensors on the device of the images, and not depend on their values"
        ) from error
    return [sum(counts.get(f"{type(twin).__name__}.{path}", {}).values()) // 2 for path in paths]


def _between(seen: Pass, before: FoundLayer, after: FoundLayer) -> tuple[str | None, bool]:
    """Return what stands between two blocks: nothing, or a module that takes what the first of them answers.

    And whether that module works on maps [B, D, height, width]. Raises UnsupportedHostError where anything else
    changes tokens there.
    """
    out, given = _ends(seen, before.block)[1], _ends(seen, after.block)[0]
    if same(out, given):
        return None, False
    for path, calls in seen.calls.items():
        pair = calls[0].tokens, calls[0].answer
        if len(calls) != 1 or pair[0] is None or pair[1] is None:
            continue
        if same(pair[0], out) and same(pair[1], given):
            return path, False
        if pair[0].dim() == pair[1].dim() == 4:
            source, target = (x.permute(0, 2, 3, 1).flatten(1, 5 - out.dim()) for x in pair if x is not None)
            if same(source, out) and same(target, given):
                return path, True
    raise UnsupportedHostError(
        f"{after.block} takes tokens {list(given.shape)} that are not the output of {before.block}, "
        f"{list(out.shape)}, nor what one module makes of it; something changes them between these blocks"
    )


def _ends(seen: Pass, path: str) -> tuple[Tensor, Tensor]:
    """Return what a block takes and what it answers; a ModuleList adds each layer's output to the tokens."""
    block = seen.module(path)
    listed = isinstance(block, nn.ModuleList)
    names = [f"{path}.{name}" for name, _ in block.named_children()] if listed else [path]
    calls = [seen.calls[name][0] for name in names if name in seen.calls]
    given, out = calls[0].tokens, calls[0].tokens if listed else calls[0].answer
    for own in calls if listed else ():
        if out is None or own.answer is None or not same(own.tokens, out):
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
    linear = (calls[-1] for path, calls in seen.calls.items() if isinstance(model.get_submodule(path), nn.Linear))
    last = max(linear, key=lambda call: call.order, default=None)
    made = None if last is None else first_tensor(last.output)
    return output.shape[-1] if made is not None and made.data_ptr() == output.data_ptr() else 0
