"""How a host calls its blocks and attention layers, and how what stands in a layer's place takes the call.

Rotary tables, position embeddings, masks and sizes reach a block beside its tokens. No host's forward is copied or
patched: what passed once, for images of the host's own size, is recorded, and passed again.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from spvit.errors import CalibrationError, UnsupportedHostError
from spvit.hosts.sites import AttentionSite, BlockSites


class _Reached(Exception):
    """Ends a forward pass early, with what was looked for."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def reached(run: Callable[[Any], object], x: Any, module: nn.Module, output: bool) -> Tensor:
    """Return the first input or the output of a module inside what is run on x; nothing after it runs."""

    def stop_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(tokens_given(args, kwargs))

    def stop_after(module: nn.Module, args: Any, result: Any) -> None:
        raise _Reached(tokens_of(result))

    if output:
        handle = module.register_forward_hook(stop_after)
    else:
        handle = module.register_forward_pre_hook(stop_before, with_kwargs=True)
    try:
        with handle:
            run(x)
    except _Reached as found:
        return found.value
    raise CalibrationError(f"the model's {type(module).__name__} was not reached; its forward pass leaves it out")


def tokens_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the tokens that a module is called with: the first tensor, by position or by name."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def tokens_of(output: Any) -> Tensor:
    """Return the tokens of what a module answers: the output, or the first of several."""
    tokens: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return tokens


@contextmanager
def in_mode(training: bool, *models: nn.Module) -> Iterator[None]:
    """Put models in training or evaluation mode inside the context; restore every flag after."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.train(training)
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def answering(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Have a module answer something else inside the context, in place of running; its hooks run."""
    own = vars(module).get("forward")
    module.forward = answer
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def answers_changed(changes: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Have modules answer what is made of their tokens inside the context, in the form in which they answer."""

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        changed = changes[module](tokens_of(output))
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    with ExitStack() as stack:
        for module in changes:
            stack.enter_context(module.register_forward_hook(change))
        yield


@dataclass(frozen=True)
class BlockCall:
    """How a model calls a block: what it passes beside tokens."""

    tokens: str | None = None
    """Keyword under which the tokens are passed; None: they are the first positional argument."""
    arguments: tuple[Any, ...] = ()
    """Further positional arguments."""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    images: int = 0
    """Images of the pass that was recorded, by which tensors are known that hold an entry for each; 0: none does."""

    def __call__(self, block: nn.Module, x: Tensor) -> Any:
        """Return the block's answer to tokens."""
        arguments, keywords = self.arguments, self.keywords
        if self.images:
            fitting = partial(self._for_images, images=len(x))
            arguments, keywords = tree_map(fitting, arguments), tree_map(fitting, keywords)
        if self.tokens is not None:
            return block(*arguments, **{self.tokens: x}, **keywords)
        return block(x, *arguments, **keywords)

    def _for_images(self, value: Any, images: int) -> Any:
        """Return an argument for so many images: a tensor that was recorded with an entry an image holds equal ones."""
        if isinstance(value, Tensor) and value.dim() and len(value) == self.images:
            return value[:1].expand(images, *value.shape[1:])
        return value


def calls_of(model: nn.Module, blocks: Sequence[BlockSites], size: tuple[int, int, int]) -> dict[str, BlockCall]:
    """Return how a model calls its blocks and what stands before them, by path, as `record_calls`.

    size: (channels, height, width) of its images, which differ here, so that what is of each image shows.
    """
    paths = [path for block in blocks for path in (block.before, block.path) if path is not None]
    # A number of images that other sizes in a model hardly are; tables may have an entry for each head.
    count = next(count for count in (3, 5, 7) if all(block.attention.heads != count for block in blocks))
    images = torch.randn(count, *size, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))
    return dict(zip(paths, record_calls(model, paths, images)))


def record_calls(model: nn.Module, paths: Sequence[str], images: Tensor) -> tuple[BlockCall, ...]:
    """Return how a model calls the blocks at some dotted names, from a pass of images, two or more of one kind.

    Blocks that are a ModuleList are not called and get no arguments.

    Raises:
        UnsupportedHostError: a block is not called, or gets something of each image beside its tokens.
    """
    calls: dict[str, BlockCall] = {}

    def record(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[path] = _call_of(path, args, kwargs, len(images))

    with ExitStack() as undo, torch.no_grad():
        for path in paths:
            block = model.get_submodule(path)
            if isinstance(block, nn.ModuleList):
                calls[path] = BlockCall()
            undo.enter_context(block.register_forward_pre_hook(partial(record, path), with_kwargs=True))
        model(images)
    missing = next((path for path in paths if path not in calls), None)
    if missing is not None:
        raise UnsupportedHostError(f"{missing} is no block that the forward pass calls; leave it out of the sites")
    return tuple(calls[path] for path in paths)


def _call_of(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], images: int) -> BlockCall:
    name = None if args else next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    keywords = {key: value for key, value in kwargs.items() if key != name}
    beside = [item for item in tree_leaves((args[1:], keywords)) if isinstance(item, Tensor)]
    by_image = [item for item in beside if item.dim() and len(item) == images]
    for item in by_image:
        if not torch.equal(item, item[:1].expand_as(item)):
            raise UnsupportedHostError(
                f"{path} gets a tensor of each image beside its tokens, {list(item.shape)}; blocks that read anything "
                "but tokens of the image are not supported"
            )
    return BlockCall(name, args[1:], keywords, images if by_image else 0)


def batch_first(site: AttentionSite, x: Tensor) -> Tensor:
    """Return tokens as [B, N, D] from the way that the layer takes and answers them, or back."""
    return x.transpose(0, 1) if site.token_first else x


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the tokens of a call, and its further arguments by the names of the layer's parameters."""
    named = {**dict(zip(names, args)), **kwargs}
    return named.pop(names[0]), named


def tokens_in(site: AttentionSite, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the tokens [B, N, D] that the projections of a dense layer get in a call."""
    x = batch_first(site, by_name(site.parameters, args, kwargs)[0] if site.parameters else args[0])
    return x if site.inner_norm is None else layer.get_submodule(site.inner_norm)(x)


@contextmanager
def called_with(module: nn.Module, site: AttentionSite) -> Iterator[dict[str, Any]]:
    """Yield what stands at a site was last called with, beside its tokens, by name; inside the context it follows."""
    last: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last.clear()
        last.update(by_name(site.parameters or ("x",), args, kwargs)[1])

    with module.register_forward_pre_hook(note, with_kwargs=True):
        yield last


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
        out: Tensor = self.attention(self.norm(x.transpose(0, 1) if self.token_first else x), **named)
        return out.transpose(0, 1) if self.token_first else out


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
