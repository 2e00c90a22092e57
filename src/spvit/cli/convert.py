"""Checkpoints of others: dense DeiT and Swin files, the published SPViT checkpoints, and their FFN indicator files.

The keys of a file say what it is. The published fine-tuned checkpoints come in two forms. In the unfolded form a
convolution is still the value and output projections with a head mix (`v`, `proj`, `head_probs`, `bn_3x3` or `bn_1x1`).
In the folded form it is a sequence of convolution, batch norm, ReLU and 1 x 1 convolution (`bconv.0`, `.1`, `.3`).

Shapes: D width, H heads, E head width, K = 9 kernel positions.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.checkpoint import fit_state, read_weights, timm_state
from spvit.errors import CheckpointError
from spvit.hosts.host import Host
from spvit.hosts.sites import AttentionSite, BlockSites
from spvit.hosts.weights import AttentionWeights
from spvit.replacements.kernels import CENTRE, POSITIONS, conv1_weights, conv3_weights, head_mix
from spvit.surgery import prune
from spvit.zoo import architectures

INDICATOR = "mlp.assigned_indicator_index"
_FORMS = {
    frozenset({"qkv", "proj"}): ("dense", "msa"),
    frozenset({"qk", "v", "proj"}): ("unfolded", "msa"),
    frozenset({"v", "proj", "head_probs", "bn_3x3"}): ("unfolded", "conv3"),
    frozenset({"v", "proj", "head_probs", "bn_1x1"}): ("unfolded", "conv1"),
    frozenset({"bconv"}): ("folded", ""),
    frozenset[str](): ("unfolded", "skip"),
}
_DESCRIBED = {
    "dense": "dense {} checkpoint",
    "unfolded": "published fine-tuned SPViT checkpoint, unfolded, {} layout",
    "folded": "published fine-tuned SPViT checkpoint, folded, {} layout",
    "indicators": "published FFN indicator file, {} layout",
}
_KERNELS: dict[tuple[int, ...], str] = {(3, 3): "conv3", (1, 1): "conv1"}
_FOLDED = {"bconv.0.": "conv_in.", "bconv.1.": "bn.", "bconv.3.": "conv_out."}  # bconv.2 is a ReLU
# Beside the projections in every Swin attention layer; the second is a buffer that timm computes.
_BESIDE = ("relative_position_bias_table", "relative_position_index")


@dataclass(frozen=True)
class Layout:
    """How the published code of one family names blocks and orders kernel positions."""

    name: str
    block: str
    """Regular expression of a block's prefix; its groups are the stage, if any, and the block."""
    temperature: float
    """Alpha of the head mix in the published checkpoints."""
    positions: tuple[int, ...]
    """Which kernel position each column of `head_probs` belongs to."""
    model: str
    """timm's names of the sizes below, with the place of the size."""
    sizes: Mapping[str, tuple[int, tuple[int, ...]]]
    """First width D and blocks a stage, by size."""


_DEIT_SIZES = {"tiny": (192, (12,)), "small": (384, (12,)), "base": (768, (12,))}
_SWIN_SIZES = {"tiny": (96, (2, 2, 6, 2)), "small": (96, (2, 2, 18, 2)), "base": (128, (2, 2, 18, 2))}
_CENTRE_FIRST = (CENTRE, *(position for position in range(POSITIONS) if position != CENTRE))
DEIT = Layout("DeiT", r"blocks\.(\d+)", 0.01, tuple(range(POSITIONS)), "deit_{}_patch16_224", _DEIT_SIZES)
SWIN = Layout("Swin", r"layers\.(\d+)\.blocks\.(\d+)", 100.0, _CENTRE_FIRST, "swin_{}_patch4_window7_224", _SWIN_SIZES)

logger = logging.getLogger("spvit")


@dataclass(frozen=True)
class Published:
    """A file that has been recognised."""

    path: str
    layout: Layout
    form: str
    """`dense`, `unfolded`, `folded`, or `indicators` for a file that lists the FFN units that stay, and no more."""
    state: dict[str, Tensor]
    blocks: tuple[str, ...]
    """Prefix of every block, in order."""
    kinds: tuple[str, ...]
    """Attention kind of every block; none in an indicator file."""

    def classes(self) -> int:
        """Return how many classes the head has; 0 when the file has no head."""
        return next((len(self.state[key]) for key in ("head.weight", "head.fc.weight") if key in self.state), 0)

    def described(self) -> str:
        """Return in words what the file was recognised as."""
        return _DESCRIBED[self.form].format(self.layout.name)


def read_published(path: str | Path) -> Published:
    """Read a file and recognise what it is.

    Raises:
        CheckpointError: the file is damaged, or its layout is none of the known ones.
    """
    state = read_weights(path)
    for layout in (DEIT, SWIN):
        matches = {match[0]: match for key in state if (match := re.match(layout.block + r"(?=\.)", key))}
        if not matches:
            continue
        blocks = tuple(sorted(matches, key=lambda prefix: [int(number) for number in matches[prefix].groups()]))
        if all(key.endswith(INDICATOR) for key in state):
            return Published(str(path), layout, "indicators", state, blocks, ())
        forms, kinds = zip(*(_attention_form(state, prefix, str(path)) for prefix in blocks))
        if "dense" in forms and set(forms) != {"dense"}:
            odd = next(prefix for prefix, form in zip(blocks, forms) if form != "dense")
            raise CheckpointError(
                f"checkpoint {path}: {odd}.attn has no qkv as the other blocks have, expected it in all blocks or none"
            )
        form = "folded" if "folded" in forms else forms[0]
        return Published(str(path), layout, form, state, blocks, kinds)
    raise CheckpointError(
        f"checkpoint {path} is of no known layout: expected DeiT's keys (blocks.0...) or Swin's "
        f"(layers.0.blocks.0...), found {next(iter(state))}"
    )


def _attention_form(state: Mapping[str, Tensor], prefix: str, path: str) -> tuple[str, str]:
    """Return the form and the kind of a block's attention by its keys."""
    part = _below(state, f"{prefix}.attn.")
    names = frozenset(key.partition(".")[0] for key in part) - set(_BESIDE)
    if names not in _FORMS:
        expected = "; ".join(", ".join(sorted(form)) for form in _FORMS if form)
        raise CheckpointError(
            f"checkpoint {path}: {prefix}.attn holds {', '.join(sorted(names))}, expected one of: {expected}"
        )
    form, kind = _FORMS[names]
    if form == "folded":
        shape = _need(part, "bconv.0.weight", f"checkpoint {path}: {prefix}.attn").shape
        if tuple(shape[2:]) not in _KERNELS:
            raise CheckpointError(
                f"checkpoint {path}: {prefix}.attn.bconv.0.weight is {list(shape)}, expected a 3 x 3 or 1 x 1 "
                "convolution"
            )
        kind = _KERNELS[tuple(shape[2:])]
    return form, kind


def model_name(published: Published) -> str:
    """Return the timm model that a checkpoint's shapes fit. Raises CheckpointError for another size."""
    layout = published.layout
    stages = [prefix.rpartition("blocks.")[0] for prefix in published.blocks]
    depths = tuple(stages.count(stage) for stage in dict.fromkeys(stages))
    width = len(_need(published.state, "patch_embed.proj.weight", f"checkpoint {published.path}"))
    for size, expected in layout.sizes.items():
        if (width, depths) == expected:
            return layout.model.format(size + ("_distilled" if "dist_token" in published.state else ""))
    known = ", ".join(f"{size}: {width} and {list(depths)}" for size, (width, depths) in layout.sizes.items())
    raise CheckpointError(
        f"checkpoint {published.path} has width {width} and {list(depths)} blocks, expected a {layout.name} of a known "
        f"size ({known}); name its timm model with --model"
    )


def architecture_name(widths: Sequence[int]) -> str | None:
    """Return the name of the published architecture whose FFNs keep so many units, or None."""
    return next((name for name, item in architectures().items() if item.widths() == tuple(widths)), None)


def indicated_architecture(indicators: Published, host: nn.Module | None = None) -> Architecture:
    """Return the architecture of an indicator file.

    The file does not list attention layers. If its widths are those of a published architecture, attention is as there;
    otherwise all attention stays.

    Args:
        indicators: the file.
        host: the model that it has to fit; None when that is not known.

    Raises:
        CheckpointError: the file is no indicator file, holds other values than zeros and ones, or does not fit.
    """
    if indicators.form != "indicators":
        raise CheckpointError(
            f"indicator file {indicators.path}: expected keys such as {indicators.blocks[0]}.{INDICATOR} alone, found "
            f"a {indicators.described()}"
        )
    ffns = []
    for prefix in indicators.blocks:
        vector = indicators.state[f"{prefix}.{INDICATOR}"].float()
        # The published code stores 1 - s + s, which rounding leaves near one.
        if vector.dim() != 1 or not torch.isclose(vector, (vector > 0.5).float(), atol=1e-3).all():
            raise CheckpointError(
                f"indicator file {indicators.path}: {prefix}.{INDICATOR} {list(vector.shape)} is not a vector of zeros "
                "and ones"
            )
        ffns.append(FFN(len(vector), tuple((vector > 0.5).nonzero().flatten().tolist())))
    for ffn, site in zip(ffns, _fitting_sites(indicators, host) if host is not None else ()):
        if ffn.width != site.ffn.units:
            raise CheckpointError(
                f"indicator file {indicators.path} does not fit: it has a vector of {ffn.width} units for "
                f"{site.ffn.first}, but the model has {site.ffn.units} there"
            )
    name = architecture_name([len(ffn.units) for ffn in ffns])
    if name is None:
        return Architecture(tuple(Block(Attention(), ffn) for ffn in ffns))
    known = architectures()[name]
    return replace(known, blocks=tuple(Block(block.attention, ffn) for block, ffn in zip(known.blocks, ffns)))


def rebuild(published: Published, host: nn.Module, indicators: Published | None = None) -> nn.Module:
    """Return the model of a checkpoint: dense, or pruned with the batch norms of its convolutions kept.

    Args:
        published: a recognised checkpoint.
        host: a dense timm model of its size; it stays as it is.
        indicators: the FFN units to keep of a dense checkpoint, or those that a fine-tuned one kept; without it, the
            first units of every FFN stand for those that a fine-tuned checkpoint kept.

    Raises:
        CheckpointError: the checkpoint or the indicators do not fit the host.
    """
    if published.form == "indicators":
        raise CheckpointError(
            f"checkpoint {published.path} is a {published.described()}, expected weights; name it with --indicators"
        )
    sites = _fitting_sites(published, host)
    indicated = indicated_architecture(indicators, host) if indicators is not None else None
    dtype = next((value.dtype for value in published.state.values() if value.is_floating_point()), None)
    model = copy.deepcopy(host).to(dtype).eval()
    state = timm_state(model, published.state, published.path)
    if published.form == "dense":
        fit_state(model, state, published.path)
        return model if indicated is None else prune(model, indicated, inplace=True)
    if published.form == "folded" and published.layout is SWIN:
        logger.warning(
            "%s: the published script folds Swin with DeiT's alpha and centre, so its convolutions are wrong already; "
            "convert the unfolded checkpoint",
            published.path,
        )
    blocks = []
    for index, (prefix, kind, site) in enumerate(zip(published.blocks, published.kinds, sites)):
        count = len(_need(published.state, f"{prefix}.mlp.fc1.weight", f"checkpoint {published.path}"))
        if count > site.ffn.units:
            raise CheckpointError(
                f"checkpoint {published.path} does not fit: {prefix}.mlp.fc1 has {count} units, but the model has "
                f"{site.ffn.units} there"
            )
        units = tuple(range(count)) if indicated is None else indicated.blocks[index].ffn.units
        if indicators is not None and len(units) != count:
            raise CheckpointError(
                f"indicator file {indicators.path} does not fit: it keeps {len(units)} units of {prefix}.mlp, but "
                f"checkpoint {published.path} has {count}"
            )
        blocks.append(Block(Attention(kind), FFN(site.ffn.units, units)))
        part = _below(state, f"{prefix}.attn.")
        own = _converted(part, kind, site.attention, published.layout, f"checkpoint {published.path}: {prefix}.attn")
        state = {key: value for key, value in state.items() if not key.startswith(f"{prefix}.attn.")}
        state |= {f"{prefix}.attn.{key}": value for key, value in own.items()}
    skip_rule = "normalised_input" if "skip" in published.kinds else "zero"
    model = prune(model, Architecture(tuple(blocks), skip_rule=skip_rule), inplace=True)
    fit_state(model, state, published.path)
    return model


def _fitting_sites(published: Published, host: nn.Module) -> Sequence[BlockSites]:
    """Return the sites of a host whose blocks are those of a file. Raises CheckpointError for other blocks."""
    sites = Host.of(host).blocks
    paths = [site.attention.path.removesuffix(".attn") for site in sites]
    if list(published.blocks) != paths:
        raise CheckpointError(
            f"{published.path} does not fit: it has {len(published.blocks)} blocks, {published.blocks[0]} to "
            f"{published.blocks[-1]}, but this {type(host).__name__} has {len(paths)}, {paths[0]} to {paths[-1]}"
        )
    return sites


def _converted(
    part: Mapping[str, Tensor], kind: str, site: AttentionSite, layout: Layout, where: str
) -> dict[str, Tensor]:
    """Return the weights of a fine-tuned attention layer under the names that they have in the pruned one."""
    if kind == "skip":
        return {}
    if kind == "msa":
        return _packed(part, site.dim, where)
    if "bconv.0.weight" not in part:
        return _unfolded(part, kind, site, layout, where)
    own = {new + key[len(old) :]: part[key] for old, new in _FOLDED.items() for key in part if key.startswith(old)}
    own["conv_out.weight"] = _need(part, "bconv.3.weight", where).flatten(1)
    if kind == "conv1":
        own["conv_in.weight"] = part["bconv.0.weight"].flatten(1)
    return {"bn.num_batches_tracked": torch.tensor(0), **own}


def _packed(part: Mapping[str, Tensor], dim: int, where: str) -> dict[str, Tensor]:
    """Return an attention layer's weights with query, key and value projections packed: qkv.weight [3 D, D]."""
    own = {key: value for key, value in part.items() if not key.startswith(("qk.", "v."))}
    for name, shape in (("weight", (dim,)), ("bias", ())):
        if name == "weight" or "qk.bias" in part or "v.bias" in part:
            query_key = _need(part, f"qk.{name}", where, (2 * dim, *shape))
            own[f"qkv.{name}"] = torch.cat([query_key, _need(part, f"v.{name}", where, (dim, *shape))])
    return own


def _unfolded(
    part: Mapping[str, Tensor], kind: str, site: AttentionSite, layout: Layout, where: str
) -> dict[str, Tensor]:
    """Return a convolution's weights from the projections [D, D] and the head mix [H, K] that it is stored as."""
    heads, dim, by_head = site.heads, site.dim, (site.heads, site.head_width)
    head_logits = torch.empty_like(_need(part, "head_probs", where, (heads, POSITIONS)))
    head_logits[:, list(layout.positions)] = part["head_probs"]
    value = _need(part, "v.weight", where, (dim, dim)).unflatten(0, by_head)
    none = value[:, :0]  # a convolution has no queries and keys
    shared = AttentionWeights(
        query_weight=none,
        query_bias=None,
        key_weight=none,
        key_bias=None,
        value_weight=value,
        value_bias=_need(part, "v.bias", where, (dim,)).unflatten(0, by_head) if "v.bias" in part else None,
        out_weight=_need(part, "proj.weight", where, (dim, dim)).unflatten(1, by_head),
        out_bias=part.get("proj.bias"),
    )
    mix = head_mix(head_logits, layout.temperature)
    weights = conv3_weights(mix, shared) if kind == "conv3" else conv1_weights(mix, shared)
    batchnorm = _below(part, "bn_3x3." if kind == "conv3" else "bn_1x1.")
    return {
        "bn.num_batches_tracked": torch.tensor(0),
        "conv_in.weight": weights.in_weight,
        "conv_in.bias": weights.in_bias,
        "conv_out.weight": weights.out_weight,
        "conv_out.bias": weights.out_bias,
        **{f"bn.{key}": value for key, value in batchnorm.items()},
    }


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _need(state: Mapping[str, Tensor], key: str, where: str, shape: Sequence[int] | None = None) -> Tensor:
    """Return a tensor by name. Raises CheckpointError when it is missing or of another shape."""
    if key not in state:
        raise CheckpointError(f"{where}: {key} is missing")
    if shape is not None and list(state[key].shape) != list(shape):
        raise CheckpointError(f"{where}: {key} is {list(state[key].shape)}, expected {list(shape)}")
    return state[key]
