"""How a host calls an attention layer, and how what stands in its place takes the call: tokens, then the rest by name.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from spvit.hosts.sites import AttentionSite


def batch_first(site: AttentionSite, x: Tensor) -> Tensor:
    """Return tokens as [B, N, D] from the way that the layer takes and answers them, or back."""
    return x.transpose(0, 1) if site.token_first else x


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the tokens of a call, and its further arguments by the names of the layer's parameters."""
    named = {**dict(zip(names, args)), **kwargs}
    return named.pop(names[0]), named


def tokens_in(site: AttentionSite, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the tokens [B, N, D] that the projections of a dense layer get in a call."""
    x = by_name(site.parameters, args, kwargs)[0] if site.parameters else args[0]
    x = batch_first(site, x)
    return x if site.inner_norm is None else layer.get_submodule(site.inner_norm)(x)


@contextmanager
def called_with(module: nn.Module, site: AttentionSite) -> Iterator[dict[str, Any]]:
    """Yield what stands at a site was last called with, beside its tokens, by name; inside the context it follows."""
    last: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last.clear()
        last.update(by_name(site.parameters or ("x",), args, kwargs)[1])

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield last
    finally:
        handle.remove()


class InPlace(nn.Module):
    """What stands where an attention layer was that is not simply called with tokens [B, N, D].

    Attributes: `norm`, the layer's own norm before its projections; `attention`, what stands there now.
    """

    def __init__(self, site: AttentionSite, norm: nn.Module | None, attention: nn.Module) -> None:
        super().__init__()
        self.parameters_of_layer = site.parameters
        self.token_first = site.token_first
        self.norm = nn.Identity() if norm is None else norm
        self.attention = attention

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes what the layer took. Returns its output, in its order of dimensions."""
        x, named = by_name(self.parameters_of_layer, args, kwargs)
        if not self.token_first:
            out: Tensor = self.attention(self.norm(x), **named)
            return out
        out = self.attention(self.norm(x.transpose(0, 1)), **named)
        return out.transpose(0, 1)


def in_place(site: AttentionSite, layer: nn.Module, module: nn.Module, norms: bool = True) -> nn.Module:
    """Return a module that maps tokens to tokens so that it takes the calls of the dense layer of a site.

    norms: whether the layer's own norm before its projections stays.
    """
    if not site.parameters:
        return module
    norm = None if site.inner_norm is None or not norms else layer.get_submodule(site.inner_norm)
    return InPlace(site, norm, module).train(layer.training)


def inside(module: nn.Module) -> nn.Module:
    """Return what maps tokens to tokens in what `in_place` returned."""
    return module.attention if isinstance(module, InPlace) else module


def answer_as_tuple(module: nn.Module, args: Any, output: Any, items: int) -> Any:
    """Forward hook: answer the output and None for what else the attention layers of some libraries answer with."""
    return output if isinstance(output, tuple) else (output, *[None] * (items - 1))


def stand_in(module: nn.Module, layer: nn.Module) -> None:
    """Say on a module what nn.TransformerEncoder reads of attention layers, such that it calls the module."""
    if isinstance(layer, nn.MultiheadAttention):
        values = {"batch_first": layer.batch_first, "num_heads": layer.num_heads, "embed_dim": layer.embed_dim}
        for name, value in {**values, "_qkv_same_embed_dim": False, "in_proj_bias": None}.items():
            setattr(module, name, value)
