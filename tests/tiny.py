"""Micro hosts, one a family and option, filled with numbers on which no test can pass by accident."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import spvit
from spvit.architecture import Architecture, Attention, dense
from spvit.hosts.rebuild import make_by_timm

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
MIXED = ("conv3", "skip", "conv1", "msa")  # attention last: class tokens see what convolutions did only through it
TURNS = [MIXED[turn:] + MIXED[:turn] for turn in range(4)]  # every kind in every block
CLASSES = 7
WIDTH, BLOCKS = 72, 4  # FFN units and blocks of all hosts but Swin, whose widths differ
EVERYTHING = dense([WIDTH] * BLOCKS)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    small = {"img_size": 64, "embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 3, "num_classes": CLASSES}

    def build() -> nn.Module:
        return make_by_timm(name, **{**small, **options})

    return build


def _swin(img_size: Any, window_size: Any = 4, **options: Any) -> Callable[[], nn.Module]:
    small = {
        "patch_size": 2,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (3, 4),  # heads of 8, then of 12
        "mlp_ratio": 3,
        "num_classes": CLASSES,
        "drop_path_rate": 0.0,
    }

    def build() -> nn.Module:
        settings = {**small, "img_size": img_size, "window_size": window_size, **options}
        return make_by_timm("swin_tiny_patch4_window7_224", **settings)

    return build


def _huggingface(**options: Any) -> Callable[[], nn.Module]:
    small = {"image_size": 64, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3}

    def build() -> nn.Module:
        import pytest

        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(**{**small, "intermediate_size": 72, "num_labels": CLASSES, **options})
        return transformers.ViTForImageClassification(config)

    return build


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "class_token": _timm("vit_tiny_patch16_224"),
    "distilled": _timm("deit_tiny_distilled_patch16_224"),
    "average_pooling": _timm("test_vit", class_token=False, global_pool="avg", dynamic_img_size=False),
    "registers": _timm("test_vit2", class_token=True, reg_tokens=3),
    "options": _timm("vit_tiny_patch16_224", init_values=0.1, qk_norm=True, scale_attn_norm=True, pre_norm=True),
    "no_biases": _timm("vit_tiny_patch16_224", qkv_bias=False, proj_bias=False),
    "rms_map_pool": _timm("test_vit3", norm_layer="rmsnorm"),
    "non_square": _timm("vit_tiny_patch16_224", img_size=(96, 160)),
    "dynamic": _timm("test_vit", dynamic_img_size=True),
    "dynamic_padded": _timm("test_vit", img_size=72, dynamic_img_size=True, dynamic_img_pad=True),
    "residual_post_norm": _timm("vit_base_patch16_rpn_224"),
    "swin": _swin(32),
    "swin_non_square": _swin((24, 40)),  # maps of 12 x 20 and 6 x 10: the second is padded
    "swin_padded": _swin((30, 34), window_size=(4, 3)),  # 15 x 17 and, merged with padding, 8 x 9
    "swin_large_window": _swin(16, window_size=7),  # 8 x 8 padded to 14; 4 x 4 in one window of its own size
    "swin_always_partition": _swin((16, 24), window_size=7, always_partition=True),  # windows larger than the map
    "swin_dynamic": _swin(32, strict_img_size=False),
    "swin_options": _swin(32, qkv_bias=False, head_dim=10, global_pool="max"),
    "huggingface": _huggingface(),
    "huggingface_options": _huggingface(image_size=(64, 96), qkv_bias=False, head_dim=16),
}
_FAMILIES = {"huggingface": "huggingface", "swin": "timm_swin"}
FAMILY_OF = {name: _FAMILIES.get(name.split("_")[0], "timm") for name in HOSTS}
ALIKE = [name for name in HOSTS if not name.startswith("swin")]  # blocks of one width, whose attention can be narrowed
BOTH = ["class_token", "huggingface"]  # one of them a library, with the same widths
ONE_A_FAMILY = [*BOTH, "swin_padded"]
OTHER_SIZES = {
    "dynamic": [(96, 160), (160, 96), (64, 64)],
    "dynamic_padded": [(96, 160), (160, 96), (71, 100)],
    "huggingface": [(96, 160), (160, 96), (64, 64)],
    "swin_dynamic": [(24, 40), (40, 24), (30, 34), (64, 64)],
}


@dataclass(frozen=True)
class Paths:
    """Dotted names of a block, its attention, the norm before it, and the two linear layers of its FFN."""

    block: str
    attention: str
    norm: str
    first: str
    second: str


def paths_of(host: nn.Module) -> list[Paths]:
    """Return the names of what every block of a host, or of a network made from one, holds."""
    found = []
    for name, module in host.named_modules():
        for attention, norm in (("attn", "norm1"), ("attention", "layernorm_before")):
            if hasattr(module, norm):
                mlp = ("mlp.fc1", "mlp.fc2") if hasattr(module, "mlp") else ("intermediate.dense", "output.dense")
                parts = (attention, norm, *mlp)  # the second of transformers before 5
                found.append(Paths(name, *(f"{name}.{part}" for part in parts)))
    return found


@torch.no_grad()
def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Fill weights, biases, norms, gates, head mixes and batch-norm statistics with random numbers, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        last = name.rpartition(".")[2]
        if last == "gate_logits":
            value = 1.5 * noise
        elif last == "head_logits":
            value = 1 + 0.01 * noise
        elif parameter.dim() == 1:
            value = 0.5 * noise + (0 if last == "bias" else 1)
        elif len(parameter) == 1:
            value = 0.5 * noise
        else:
            value = noise / math.sqrt(parameter[0].numel())
        parameter.copy_(value)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.5 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return net


def make_host(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a randomised micro host in evaluation mode."""
    return randomise(HOSTS[name]()).to(dtype).eval()


def gate_signs(kind: str) -> Tensor:
    """Return signs of three gate logits that decide on a kind; a gate behind a closed one is open, in vain."""
    opened = ("skip", "conv1", "conv3", "msa").index(kind)
    return torch.tensor(([1] * opened + [-1] + [1] * 2)[:3])


@torch.no_grad()
def choose(net: nn.Module, kinds: Sequence[str]) -> nn.Module:
    """Make the attention gates of a searchable network decide on these kinds, with random margins, in place."""
    gated = [module for module in net.modules() if hasattr(module, "head_logits")]
    for attention, kind in zip(gated, kinds, strict=True):
        attention.gate_logits.copy_((attention.gate_logits.abs() + 0.1) * gate_signs(kind).to(attention.gate_logits))
    return net


def make_net(name: str, kinds: Sequence[str] = MIXED, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    """Return a host, and a searchable network made from it whose weights have all moved since; in evaluation mode."""
    host = make_host(name, dtype)
    return host, choose(randomise(spvit.make_searchable(host), seed=1), kinds)


def ffn_widths(host: nn.Module) -> tuple[int, ...]:
    """Return the hidden units of every block's FFN."""
    return tuple(len(host.get_submodule(paths.first).weight) for paths in paths_of(host))


def with_kinds(architecture: Architecture, *kinds: str) -> Architecture:
    """Return an architecture with other attention kinds."""
    blocks = (replace(block, attention=Attention(kind)) for block, kind in zip(architecture.blocks, kinds, strict=True))
    return replace(architecture, blocks=tuple(blocks))


def input_size(host: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a host takes."""
    embed = getattr(host, "patch_embed", None)
    if embed is not None:
        return (embed.proj.in_channels, *embed.img_size)
    size = host.config.image_size
    return (host.config.num_channels, *((size, size) if isinstance(size, int) else size))


def images(host: nn.Module, batch: int = 2, size: tuple[int, int] | None = None, seed: int = 0) -> Tensor:
    """Return random images that a dense host takes, or images of another (height, width)."""
    channels, *own = input_size(host)
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, *(size or own))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(next(host.parameters()).dtype)


def logits_of(output: Any) -> Tensor:
    """Return the logits [B, classes], or the features, of whatever a model answered."""
    names = ("logits", "image_embeds", "pooler_output", "last_hidden_state")
    output = next((found for name in names if (found := getattr(output, name, None)) is not None), output)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def logits(net: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """Return a model's logits [B, classes]."""
    return logits_of(net(x, **options))


def count_macs(model: nn.Module, x: Tensor) -> int:
    """Return the MACs of a forward pass on images, as PyTorch counts them: with attention in its plain products.

    On the CPU narrow attention of two ranks is filled up with zeros, so give it images on the meta device.
    """
    twin = copy.deepcopy(model).to(x.device).eval().requires_grad_(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        twin(x)
    return counter.get_total_flops() // 2


def backward(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run a forward and backward pass of a loss with uneven weights; return the gradients by name."""
    net.zero_grad()
    out = logits_of(net(x))
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)).sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def largest(tensors: Sequence[Tensor]) -> float:
    """Return the largest magnitude in several tensors; zero when they are empty."""
    return max(tensor.abs().max().item() if tensor.numel() else 0.0 for tensor in tensors)


def assert_close(actual: Tensor, expected: Tensor, scale: float | None = None, what: str = "tensors") -> None:
    """Compare within the dtype's tolerance, relative to the largest magnitude of `expected` (or `scale`)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    scale = largest([expected]) if scale is None else scale
    error = largest([actual - expected])
    assert error <= TOLERANCE[expected.dtype] * scale, f"{what} differ by {error:.3g}, the scale being {scale:.3g}"


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare gradients by name; those that are zero but for rounding are held against the largest of all."""
    assert actual.keys() == expected.keys()
    scale = largest(list(expected.values()))
    for name, value in expected.items():
        assert_close(actual[name], value, scale, name)


def assert_differ(actual: Tensor, expected: Tensor) -> None:
    """Check that two results are clearly not the same: by 1% of the largest magnitude."""
    assert (actual - expected).abs().max() > 0.01 * expected.abs().max()


def everything_of(model: nn.Module) -> tuple[Any, ...]:
    """Return modules, hooks, flags, attributes and tensors of a model, to compare before and after."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    state = {key: value.nan_to_num(12345.0) for key, value in model.state_dict().items()}
    shown = {
        name: (id(module), type(module), module.training, [len(getattr(module, hook)) for hook in hooks])
        for name, module in model.named_modules()
    }
    plain = {
        name: {key: value for key, value in vars(module).items() if isinstance(value, (int, str, tuple, bool))}
        for name, module in model.named_modules()
    }
    flags = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    return shown, plain, flags, hasattr(model, "spvit_record"), state


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    """Compare a model with what `everything_of` returned before."""
    after = everything_of(model)
    assert after[:-1] == before[:-1]
    assert all(torch.equal(after[-1][key], value) for key, value in before[-1].items())
