"""How attention layers get the tokens of their block, in windows or as a map: found by matching rows, then verified.

Shapes: B images, G grid tokens of a block's map (row-major), S tokens that its attention gets of an image, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spvit.errors import UnsupportedHostError
from spvit.hosts.behaviour.watch import Call, Pass, first_tensor
from spvit.hosts.grid import GatheredGrid, Layout


def places_of(rows: Tensor, source: Tensor) -> tuple[int, ...] | None:
    """Return which row of a source [R, C] each row is, bit for bit; -1: padding, all alike. None: it cannot be said."""
    known: dict[bytes, int] = {}
    for index, row in enumerate(source.double().cpu().numpy()):
        known[row.tobytes()] = -2 if row.tobytes() in known else index
    found = [known.get(row.tobytes(), -1) for row in rows.double().cpu().numpy()]
    padding = rows[[place == -1 for place in found]]
    if -2 in found or len(padding) == len(rows) or not bool((padding == padding[:1]).all()):
        return None
    return tuple(found)


def layout_of(seen: Pass, layer: str, block: str, images: int, prefix: int) -> tuple[Layout, str | None] | None:
    """Return how a layer gets its block's tokens and the module that made them (None: the block gets them).

    None: it gets them as no rearrangement of anything in the block that a map or tokens [B, G, D] may be.
    """
    call, around = seen.calls[layer][0], seen.calls.get(block)
    given, stream = call.tokens, None if around is None else around[0].tokens
    if given is None or stream is None or prefix or len(given.flatten(0, -2)) % images:
        return None
    rows = given.reshape(images, -1, given.shape[-1])
    inside = sorted((own[0].order, path) for path, own in seen.calls.items() if f"{path}.".startswith(f"{block}."))
    before = [path for order, path in inside if order < call.order]
    for path, tokens in [(None, stream), *((path, seen.calls[path][0].answer) for path in before)]:
        if tokens is None or tokens.dim() < 3 or len(tokens) != images or tokens.shape[-1] != given.shape[-1]:
            continue
        tokens = tokens.flatten(1, -2)
        places = places_of(rows[0], tokens[0])
        if places is None or sorted(place for place in places if place >= 0) != list(range(tokens.shape[1])):
            continue
        layout = Layout(places, tuple(given.shape[1:-1]))
        if all(places_of(*pair) == places for pair in zip(rows[1:], tokens[1:])):
            return layout, path
    return None


def is_plain(layout: Layout, given: Tensor, images: int) -> bool:
    """Return whether a layer simply gets the tokens [B, G, D] of its block."""
    return given.dim() == 3 and len(given) == images and layout.places == tuple(range(given.shape[1]))


def check_answers(twin: nn.Module, layer: str, block: nn.Module, call: Call, layout: Layout) -> None:
    """Raise UnsupportedHostError unless what a layer answers for a token moves that token of its block alone."""
    generator = torch.Generator().manual_seed(2)
    stream = call.tokens
    assert stream is not None
    images, tokens = len(stream), stream.flatten(1, -2).shape[1]
    chosen = torch.rand(images, tokens, generator=generator) < 0.5
    code = chosen[..., None] * torch.randn(stream.shape[-1], generator=generator)
    marked = GatheredGrid(1, tokens, layout).scatter(code)
    padding = torch.tensor(layout.places).view(-1, *layout.shape) < 0
    marked[padding.repeat(images, *[1] * len(layout.shape))] = 1
    outputs = []
    for answer in (torch.zeros_like(marked), marked):

        def give(module: nn.Module, args: object, output: object, answer: Tensor = answer) -> object:
            own = answer.to(stream)
            return own if isinstance(output, Tensor) else (own, *output[1:])  # type: ignore[index]

        handle = twin.get_submodule(layer).register_forward_hook(give)
        try:
            output = first_tensor(call.again(block))
        finally:
            handle.remove()
        assert output is not None
        outputs.append(output.flatten(1, -2))
    moved = (outputs[1] - outputs[0]).abs().amax(-1)
    if moved.shape != chosen.shape or not torch.equal((moved > 1e-6 * moved.max()).cpu(), chosen):
        raise UnsupportedHostError(
            f"{layer}: what it answers for a token of a window does not come back to that token alone"
        )
