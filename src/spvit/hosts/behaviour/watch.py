"""Records one forward pass of any model: what every module took and answered, and where attention ran.

Attention is known by what it does: fused attention, or a softmax of scaled products that is multiplied with values.

Shapes: B images (or windows), H heads, N tokens, M tokens attended to, E head width.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spvit.errors import UnsupportedHostError
from spvit.hosts.calling import in_mode
from spvit.hosts.declared import Sites

PRODUCTS = ("matmul", "__matmul__", "bmm", "einsum")


@dataclass(frozen=True)
class Core:
    """One softmax(scale q k^T + bias) v that ran."""

    running: tuple[str, ...]
    """Dotted names of the modules that were running, the innermost first."""
    query: Tensor
    """[B, H, N, E]; keys and values are [B, H, M, E]."""
    key: Tensor
    value: Tensor
    output: Tensor
    """[B, H, N, E]."""
    scale: float | None
    """Factor of the products; None: the logits are more than scaled products and a bias."""
    bias: Tensor | None = None
    """What is added to the scaled products, the same for every image: [1 or B, H, N, M]."""
    flat: bool = False
    """Whether images, windows and heads were one dimension: then B and H are a guess, of one window an image."""
    scales: Tensor | None = None
    """Factors of each head's products, [H], beside the scale; None: no head has one of its own."""

    def split(self, rows: int) -> Core:
        """Return the same for so many tokens of all images and windows: [rows / N, H, N, E]."""
        count = self.output.shape[2]
        if not self.flat or rows % count or self.output.shape[:2].numel() % (rows // count):
            return self
        parts = (self.query, self.key, self.value, self.output)
        query, key, value, output = (part.flatten(0, 1).unflatten(0, (rows // count, -1)) for part in parts)
        return replace(self, query=query, key=key, value=value, output=output)


@dataclass
class Call:
    """One call of a module, with its tokens as they were then: what follows may change them in place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: Tensor | None
    """A copy of the first tensor that was passed."""
    output: Any = None
    answer: Tensor | None = None
    """A copy of the tensor that was answered, or of the first of several."""
    order: int = 0
    """By when calls end."""

    @property
    def given(self) -> Tensor | None:
        """The first tensor that was passed, itself."""
        return first_tensor((*self.args, *self.kwargs.values()))

    def again(self, module: nn.Module) -> Any:
        """Call a module again in the same way."""
        given, fresh = self.given, None if self.tokens is None else self.tokens.clone()

        def anew(value: Any) -> Any:
            return fresh if value is given and given is not None else value

        return module(*map(anew, self.args), **{name: anew(value) for name, value in self.kwargs.items()})


@dataclass
class Pass:
    """What was seen in one forward pass of a model."""

    model: nn.Module
    calls: dict[str, list[Call]] = field(default_factory=dict)
    """By dotted name, in the order of the first call."""
    cores: list[Core] = field(default_factory=list)
    softmaxes: dict[str, str] = field(default_factory=dict)
    """Names of modules in which a softmax over square logits ran that no core accounts for, and what is known of it."""
    linears: list[tuple[tuple[str, ...], Tensor, Tensor]] = field(default_factory=list)
    """Every linear map that ran: names of the modules that were running, the innermost first, its input and output."""
    output: Any = None
    declared: Sites | None = None
    """What a user says of the layers, which counts in place of what was seen run in them."""

    def module(self, path: str) -> nn.Module:
        """Return the module at a dotted name."""
        return self.model.get_submodule(path)

    def once(self, path: str) -> Call:
        """Return the one call of a module. Raises UnsupportedHostError when there were none or more."""
        calls = self.calls.get(path, [])
        if len(calls) != 1:
            raise UnsupportedHostError(
                f"{path} runs {len(calls)} times in a forward pass (in chunks of tokens, or for several blocks?); "
                "expected once"
            )
        return calls[0]

    def inside(self, path: str) -> Iterator[tuple[str, nn.Module, Call]]:
        """Yield the names inside a module, the modules, and the first calls of what ran in it."""
        for name, module in self.module(path).named_modules():
            if name and f"{path}.{name}" in self.calls:
                yield name, module, self.calls[f"{path}.{name}"][0]

    def made_in(self, path: str) -> list[tuple[Tensor, Tensor]]:
        """Return inputs and outputs [T, ...] of the linear maps that ran inside a module."""
        found = (item for item in self.linears if path in item[0])
        return [(given.flatten(0, -2), made.flatten(0, -2)) for _, given, made in found]


def watch(model: nn.Module, images: Tensor) -> Pass:
    """Run a model once on images, in evaluation mode, and return what was seen."""
    seen, stack, ended = Pass(model), [], itertools.count()  # type: Pass, list[str], Iterator[int]
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copied(x: Tensor | None) -> Tensor | None:
        """Return a copy, the same one for a tensor that has not changed since: most leave one module for the next."""
        if x is None:
            return None
        state = (x.data_ptr(), x._version, x.shape, x.stride())
        if state not in copies:
            copies[state] = x.clone()
        return copies[state]

    def enter(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.append(name)
        call = Call(args, kwargs, copied(first_tensor((*args, *kwargs.values()))))
        seen.calls.setdefault(name, []).append(call)

    def leave(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = seen.calls[stack.pop()][-1]
        call.output, call.answer, call.order = output, copied(first_tensor(output)), next(ended)

    with ExitStack() as undo:
        for name, module in model.named_modules():
            undo.enter_context(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            undo.enter_context(module.register_forward_hook(partial(leave, name), with_kwargs=True))
        with _Watching(seen, stack, len(images)):
            seen.output = model(images)
    return seen


class _Watching(TorchFunctionMode):
    """Sees fused attention, and softmaxes between two products."""

    def __init__(self, seen: Pass, stack: list[str], images: int) -> None:
        super().__init__()
        self.seen, self.stack, self.images = seen, stack, images
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []
        self.logits: Tensor | None = None
        self.weights: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if func is F.scaled_dot_product_attention:
            self._fused(out, *args, **(kwargs or {}))
        elif name == "softmax" and isinstance(out, Tensor) and out.dim() >= 3 and out.shape[-1] == out.shape[-2]:
            self.logits, self.weights = args[0] if args else kwargs["input"], out
            self.seen.softmaxes.setdefault(self._running()[0], "it is not multiplied with values right behind")
        elif func is F.linear:
            self.seen.linears.append((self._running(), args[0], out))
        elif name in PRODUCTS and isinstance(out, Tensor):
            parts = _as_product(name, args, out)
            if parts is not None:
                self._product(*parts)
        return out

    def _running(self) -> tuple[str, ...]:
        return tuple(reversed(self.stack))

    def _fused(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        mask = args[0] if args else kwargs.get("attn_mask")
        if query.dim() not in (3, 4) or query.shape[1] != key.shape[1]:
            return
        flat, bias, known = query.dim() == 3, None, True  # type: bool, Tensor | None, bool
        if kwargs.get("is_causal", args[2] if len(args) > 2 else False):
            mask = torch.ones(query.shape[-2], key.shape[-2], device=query.device).tril().bool()
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        if mask is not None:
            bias = mask.expand(*([1] * (4 - mask.dim())), *mask.shape)
            if flat and mask.shape == (*query.shape[:2], key.shape[1]):
                by_image = mask.unflatten(0, (self.images, -1))
                # A bias of each image, from its queries, is no bias in the sense of a core, and it is large.
                known = bool((by_image == by_image[:1]).all())
                bias = by_image[:1] if known else None
        scale = float(kwargs.get("scale") or query.shape[-1] ** -0.5) if known else None
        query, key, value, out = (_by_head(part, self.images) for part in (query, key, value, out))
        self.seen.cores.append(Core(self._running(), query, key, value, out, scale, bias, flat))

    def _product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        weights = self.weights
        if weights is not None and left.numel() == weights.numel() and left.data_ptr() == weights.data_ptr():
            self._eager(right, out)
            self.weights = None
        elif left.dim() >= 3 and left.shape[-2] == right.shape[-1]:
            self.products = [*self.products[-1:], (left, right, out)]

    def _eager(self, value: Tensor, output: Tensor) -> None:
        """Note the core of a softmax that has just been multiplied with values."""
        logits = self.logits
        assert logits is not None
        found = [item for item in self.products if item[2].numel() == logits.numel()]
        self.seen.softmaxes.pop(self._running()[0], None)
        if not found:
            return
        left, right, _ = found[-1]
        parts = (_by_head(part, self.images) for part in (left, right.mT, value, output, logits))
        query, key, value, output, square = parts
        scale, bias, scales = _explained(query @ key.mT, square, self.images)
        self.seen.cores.append(Core(self._running(), query, key, value, output, scale, bias, left.dim() == 3, scales))


def _as_product(name: str, args: Any, out: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the operands of a product and what it answers as [.., N, K], [.., K, M] and [.., N, M]."""
    if name != "einsum":
        return (args[0], args[1], out) if isinstance(args[0], Tensor) and isinstance(args[1], Tensor) else None
    tensors = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
    found = re.fullmatch(r"(\w+),(\w+)->(\w+)", args[0].replace(" ", "")) if isinstance(args[0], str) else None
    if found is None or len(tensors) != 2:
        return None
    left, right, result = found.groups()
    batch = [letter for letter in left if letter in right and letter in result]
    rows, columns = ([i for i in one if i not in other] for one, other in ((left, right), (right, left)))
    summed = [letter for letter in left if letter in right and letter not in result]
    orders = ([*batch, *rows, *summed], [*batch, *summed, *columns], [*batch, *rows, *columns])
    if not len(summed) == len(rows) == len(columns) == 1 or sorted(orders[2]) != sorted(result):
        return None
    named = zip((*tensors, out), found.groups(), orders)
    one, other, made = (x.permute([letters.index(i) for i in order]) for x, letters, order in named)
    return one, other, made


def _by_head(x: Tensor, images: int) -> Tensor:
    """Return [B, H, ...] of what may have both in one dimension."""
    return x if x.dim() == 4 else x.unflatten(0, (images, -1))


def _explained(products: Tensor, logits: Tensor, images: int) -> tuple[float | None, Tensor | None, Tensor | None]:
    """Return scale, bias and scales of heads: logits are scaled products and a bias that is the same for every image.

    No scale: they are more than that.
    """
    if not logits.isfinite().all():
        return None, torch.full((1, 1, 1, 1), -torch.inf), None
    p, z = (part.double().unflatten(0, (images, -1)) for part in (products, logits))  # [images, windows, H, N, M]
    dp, dz = p[1:] - p[:-1], z[1:] - z[:-1]
    spread = dz.square().mean().sqrt()  # of what differs between images: masks are far larger
    for by_head in (False, True):
        summed = (0, 1, 3, 4) if by_head else (0, 1, 2, 3, 4)
        scales = (dp * dz).sum(summed, keepdim=True) / dp.square().sum(summed, keepdim=True)
        bias = (z - scales * p).mean(0)
        if bool((z - scales * p - bias).abs().max() <= 1e-3 * spread):
            added = bias.to(products) if bool(bias.abs().max() > 1e-3 * spread) else None
            return (1.0, added, scales.flatten()) if by_head else (float(scales), added, None)
    return None, None, None


class _Dropping(TorchFunctionMode):
    """Sees the probabilities of dropout, of attention weights and of tokens, and drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.tokens = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.attention = max(self.attention, float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)))
            args, kwargs = args[:4], {"is_causal": args[5] if len(args) > 5 else False, **kwargs, "dropout_p": 0.0}
        elif func is F.dropout:
            probability = float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
            if args[0].shape[-1] == args[0].shape[-2] and args[0].dim() >= 3:
                self.attention = max(self.attention, probability)
            else:
                self.tokens = max(self.tokens, probability)
            return args[0]
        return func(*args, **kwargs)


def dropouts(layer: nn.Module, path: str, call: Call) -> tuple[float, float]:
    """Return the dropout probabilities of a layer's attention weights and of its output, from a call that was seen.

    Raises UnsupportedHostError for a layer that computes something else in training mode.
    """
    if isinstance(layer, nn.MultiheadAttention):
        return float(layer.dropout), 0.0
    with in_mode(True, layer), _Dropping() as seeing:
        answer = first_tensor(call.again(layer))
    if answer is not None and call.answer is not None and not same(answer, call.answer):
        raise UnsupportedHostError(
            f"{path} computes something else in training mode than in evaluation, beside dropout; spvit prunes what it "
            "does in evaluation: give it one forward for both"
        )
    return seeing.attention, seeing.tokens


def same(one: Tensor | None, other: Tensor) -> bool:
    """Return whether two tensors are the same but for rounding."""
    if one is None or one.shape != other.shape:
        return False
    near = 1e-5 * float(other.abs().max())
    return torch.allclose(one[0], other[0], 1e-4, near) and torch.allclose(one, other, 1e-4, near)


def first_tensor(output: Any) -> Tensor | None:
    """Return the tensor that a module answered, or the first of several."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)
