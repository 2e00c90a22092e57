"""What a model passes to its blocks beside tokens, recorded from a real forward pass and replayed.

Rotary tables, position embeddings, masks and sizes reach a block as further arguments. No host's forward is copied or
patched: what passed once, for images of the host's own size, is passed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spvit.errors import UnsupportedHostError


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
        images = len(x)
        arguments = [_for_images(value, self.images, images) for value in self.arguments]
        keywords = {name: _for_images(value, self.images, images) for name, value in self.keywords.items()}
        if self.tokens is not None:
            return block(*arguments, **{self.tokens: x}, **keywords)
        return block(x, *arguments, **keywords)


def _for_images(value: Any, recorded: int, images: int) -> Any:
    """Return an argument for so many images: a tensor that was recorded with an entry an image holds equal ones."""
    if isinstance(value, (tuple, list)):
        return type(value)(_for_images(item, recorded, images) for item in value)
    if recorded and isinstance(value, Tensor) and value.dim() and len(value) == recorded:
        return value[:1].expand(images, *value.shape[1:])
    return value


def record_calls(model: nn.Module, paths: Sequence[str], images: Tensor) -> tuple[BlockCall, ...]:
    """Return how a model calls the blocks at some dotted names, from a pass of images, two or more of one kind.

    Blocks that are a ModuleList are not called and get no arguments.

    Raises:
        UnsupportedHostError: a block is not called, or gets something of each image beside its tokens.
    """
    calls: dict[str, BlockCall] = {}

    def recorder(path: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[path] = _call_of(path, args, kwargs, len(images))

        return record

    handles = []
    for path in paths:
        block = model.get_submodule(path)
        if isinstance(block, nn.ModuleList):
            calls[path] = BlockCall()
        else:
            handles.append(block.register_forward_pre_hook(recorder(path), with_kwargs=True))
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    missing = next((path for path in paths if path not in calls), None)
    if missing is not None:
        raise UnsupportedHostError(f"{missing} is no block that the forward pass calls; leave it out of the sites")
    return tuple(calls[path] for path in paths)


def _call_of(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], images: int) -> BlockCall:
    name = None if args else next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    keywords = {key: value for key, value in kwargs.items() if key != name}
    by_image = False
    for value in (*args[1:], *keywords.values()):
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, Tensor) and item.dim() and len(item) == images:
                by_image = True
                if not torch.equal(item, item[:1].expand_as(item)):
                    raise UnsupportedHostError(
                        f"{path} gets a tensor of each image beside its tokens, {list(item.shape)}; blocks that read "
                        "anything but tokens of the image are not supported"
                    )
    return BlockCall(name, args[1:], keywords, images if by_image else 0)
