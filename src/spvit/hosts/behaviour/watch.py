"""Records one forward pass of any model: what every module took and answered, and where attention ran.

Attention is known by what it does: fused attention, or a softmax of scaled products that is multiplied with values.

Shapes: B images (or windows), H heads, N tokens, M tokens attended to, E head width.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spvit.hosts.declared import Sites

PRODUCTS = ("matmul", "__matmul__", "bmm", "einsum")


@dataclass(frozen=True)
class Core:
    """One softmax(scale q k^T + bias) v that ran."""

    running: tuple[str, ...]
    """Dotted names of the modules that were running, the innermost first."""
    query: Tensor
    """[B, H, N, E]."""
    key: Tensor
    """[B, H, M, E]."""
    value: Tensor
    """[B, H, M, E]."""
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

    def again(self, module: nn.Module) -> Any:
        """Call a module again in the same way."""
        given = first_tensor((*self.args, *self.kwargs.values()))
        fresh = None if self.tokens is None else self.tokens.clone()

        def anew(value: Any) -> Any:
            return fresh if value is given and given is not None else value

        with torch.no_grad():
            return module(*map(anew, self.args), **{name: anew(value) for name, value in self.kwargs.items()})

    def takes_what(self, other: Call) -> bool:
        """Return whether its first tensor is the very one that another call answered."""
        given, answered = first_tensor((*self.args, *self.kwargs.values())), first_tensor(other.output)
        return given is not None and answered is not None and given.data_ptr() == answered.data_ptr()


@dataclass
class Pass:
    """What was seen in one forward pass."""

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

    def first(self, path: str) -> Call | None:
        """Return the first call of a module; None if it did not run."""
        return self.calls[path][0] if path in self.calls else None

    def made_in(self, path: str) -> list[tuple[Tensor, Tensor]]:
        """Return inputs and outputs [T, ...] of the linear maps that ran inside a module."""
        found = (item for item in self.linears if path in item[0])
        return [(given.flatten(0, -2), made.flatten(0, -2)) for _, given, made in found]


def watch(model: nn.Module, images: Tensor) -> Pass:
    """Run a model once on images, in evaluation mode, and return what was seen."""
    seen, stack, handles = Pass(), [], []  # type: Pass, list[str], list[Any]
    ended = itertools.count()
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copied(x: Tensor | None) -> Tensor | None:
        """Return a copy, the same one for a tensor that has not changed since: most leave one module for the next."""
        if x is None:
            return None
        state = (x.data_ptr(), x._version, x.shape, x.stride())
        if state not in copies:
            copies[state] = x.clone()
        return copies[state]

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stack.append(name)
            tokens = copied(first_tensor((*args, *kwargs.values())))
            seen.calls.setdefault(name, []).append(Call(args, kwargs, tokens))

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stack.pop()
            call = seen.calls[name][-1]
            call.output, call.answer = output, copied(first_tensor(output))
            call.order = next(ended)

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name), with_kwargs=True))
    try:
        with torch.no_grad(), _Watching(seen, stack, len(images)):
            seen.output = model(images)
    finally:
        for handle in handles:
            handle.remove()
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
            self._product(name, args, out)
        return out

    def _running(self) -> tuple[str, ...]:
        return tuple(reversed(self.stack))

    def _fused(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        mask = args[0] if args else kwargs.get("attn_mask")
        causal = kwargs.get("is_causal", args[2] if len(args) > 2 else False)
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        if causal:
            mask = torch.full((query.shape[-2], key.shape[-2]), -torch.inf, device=query.device).triu(1)
        if query.dim() not in (3, 4) or query.shape[1] != key.shape[1]:
            return
        flat, bias, known = query.dim() == 3, None, float(scale)  # type: bool, Tensor | None, float | None
        if mask is not None:
            bias = mask.expand(*([1] * (4 - mask.dim())), *mask.shape)
            if flat and mask.shape == (*query.shape[:2], key.shape[1]):
                by_image = mask.unflatten(0, (self.images, -1))
                # A bias of each image, from its queries, is no bias in the sense of a core, and it is large.
                bias, known = (by_image[:1], known) if bool((by_image == by_image[:1]).all()) else (None, None)
        query, key, value, out = (_by_head(part, self.images) for part in (query, key, value, out))
        self.seen.cores.append(Core(self._running(), query, key, value, out, known, bias, flat))

    def _product(self, name: str, args: Any, out: Tensor) -> None:
        left, right = _operands(name, args, out)
        if left is None or right is None:
            return
        weights = self.weights
        if weights is not None and left.numel() == weights.numel() and left.data_ptr() == weights.data_ptr():
            self._eager(right, _by_head(out if name != "einsum" else _einsum_out(args[0], out), self.images))
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
        query, key = (_by_head(part, self.images) for part in (left, right.transpose(-1, -2)))
        square = _by_head(logits, self.images)
        scale, bias, scales = _explained(query @ key.transpose(-1, -2), square, self.images)
        value, flat = _by_head(value, self.images), left.dim() == 3
        self.seen.cores.append(Core(self._running(), query, key, value, output, scale, bias, flat, scales))


def _operands(name: str, args: Any, out: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the two operands of a product as [..., N, K] and [..., K, M]."""
    if name != "einsum":
        return (args[0], args[1]) if isinstance(args[0], Tensor) and isinstance(args[1], Tensor) else (None, None)
    tensors = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
    letters = re.fullmatch(r"(\w+),(\w+)->(\w+)", args[0].replace(" ", "")) if isinstance(args[0], str) else None
    if letters is None or len(tensors) != 2:
        return None, None
    left, right, result = letters.groups()
    summed = [letter for letter in left if letter in right and letter not in result]
    batch = [letter for letter in left if letter in right and letter in result]
    rows = [letter for letter in left if letter not in right]
    columns = [letter for letter in right if letter not in left]
    if not len(summed) == len(rows) == len(columns) == 1:
        return None, None
    order = ("".join([*batch, *rows, *summed]), "".join([*batch, *summed, *columns]))
    return tensors[0].permute([left.index(i) for i in order[0]]), tensors[1].permute([right.index(i) for i in order[1]])


def _einsum_out(equation: str, out: Tensor) -> Tensor:
    """Return the output of a product of weights [.., N, M] and values with its letters as those of the weights lie."""
    left, right, result = re.split(",|->", equation.replace(" ", ""))
    order = [*(letter for letter in left if letter in result), *(letter for letter in right if letter not in left)]
    return out.permute([result.index(letter) for letter in order])


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


class _Stopped(Exception):
    """Ends a forward pass with what arrived."""

    def __init__(self, arrived: Tensor) -> None:
        super().__init__()
        self.arrived = arrived


def stopped_at(run: nn.Module, images: Tensor | None, module: nn.Module, call: Call | None = None) -> Tensor:
    """Return the first tensor that a module gets when a model runs on images, or anew as in a call that was seen."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Stopped(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            run(images) if call is None else call.again(run)
    except _Stopped as stopped:
        return stopped.arrived
    finally:
        handle.remove()
    raise RuntimeError("the module was not reached")


@contextmanager
def silenced(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Have modules at some dotted names answer zeros inside the context."""

    def zeros(module: nn.Module, args: Any, output: Any) -> Any:
        return torch.zeros_like(output) if isinstance(output, Tensor) else (torch.zeros_like(output[0]), *output[1:])

    handles = [model.get_submodule(path).register_forward_hook(zeros) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Dropping(TorchFunctionMode):
    """Sees the probabilities of dropout: of attention weights, and of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.tokens = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.attention = max(self.attention, float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)))
        elif func is F.dropout:
            probability = float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
            if args[0].shape[-1] == args[0].shape[-2] and args[0].dim() >= 3:
                self.attention = max(self.attention, probability)
            else:
                self.tokens = max(self.tokens, probability)
        return func(*args, **kwargs)


def dropouts(layer: nn.Module, call: Call) -> tuple[float, float]:
    """Return the dropout probabilities of a layer's attention weights and of its output, from a call that was seen."""
    if isinstance(layer, nn.MultiheadAttention):
        return float(layer.dropout), 0.0
    flags = [(module, module.training) for module in layer.modules()]
    seeing = _Dropping()
    try:
        layer.train()  # which some layers of users' own answer with nothing
        with seeing:
            call.again(layer)
    finally:
        for module, flag in flags:
            module.training = flag
    return seeing.attention, seeing.tokens


def first_tensor(output: Any) -> Tensor | None:
    """Return the tensor that a module answered, or the first of several."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)
