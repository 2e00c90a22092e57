"""Checkpoints of others: dense DeiT and Swin files, the published SPViT checkpoints, and their FFN indicator files.

The keys of a file say what it is. In the unfolded form of a published fine-tuned checkpoint a convolution is still the
value and output projections with a head mix; in the folded form it is a sequence of convolution, batch norm, ReLU and
1 x 1 convolution (`bconv.0` to `.3`).

Shapes: D width, H heads, E head width, K = 9 kernel positions.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spvit.architecture import FFN, Architecture, Attention, Block, dense
from spvit.checkpoint import fit_state, read_weights, timm_state
from spvit.errors import CheckpointError
from spvit.hosts.host import Host
from spvit.hosts.sites import AttentionSite, BlockSites
from spvit.hosts.weights import AttentionWeights
from spvit.replacements.kernels import POSITIONS, conv1_weights, conv3_weights, head_mix
from spvit.surgery import prune
from spvit.zoo import architectures, host_name

INDICATOR = "mlp.assigned_indicator_index"
# What the parts of an attention layer say of the file and of the layer; a folded one's kind is in its kernel.
_FORMS = {
    ("proj", "qkv"): ("dense", "msa"),
    ("proj", "qk", "v"): ("unfolded", "msa"),
    ("bn_3x3", "head_probs", "proj", "v"): ("unfolded", "conv3"),
    ("bn_1x1", "head_probs", "proj", "v"): ("unfolded", "conv1"),
    ("bconv",): ("folded", ""),
    (): ("unfolded", "skip"),
}
_KERNELS: dict[tuple[int, ...], str] = {(3, 3): "conv3", (1, 1): "conv1"}
# The layers of a convolution, unfolded and folded, by their names in a pruned model; bconv.2 is a ReLU.
_LAYERS = {"bn_3x3": "bn", "bn_1x1": "bn", "bconv.0": "conv_in", "bconv.1": "bn", "bconv.3": "conv_out"}
# Beside the projections in a Swin attention layer; the second is a buffer that timm computes.
_BESIDE = ("relative_position_bias_table", "relative_position_index")


@dataclass(frozen=True)
class Layout:
    """How the published code of one family names blocks and orders kernel positions."""

    name: str
    block: str
    """Regular expression of a block's prefix; its groups are the stage, if any, and the block."""
    temperature: float
    """Alpha of the head mix in the published checkpoints."""
    columns: tuple[int, ...]
    """Which column of `head_probs` each kernel position has."""


DEIT = Layout("DeiT", r"blocks\.(\d+)", 0.01, tuple(range(POSITIONS)))
SWIN = Layout("Swin", r"layers\.(\d+)\.blocks\.(\d+)", 100.0, (1, 2, 3, 4, 0, 5, 6, 7, 8))  # the centre is first


@dataclass(frozen=True)
class Published:
    """A file that has been recognised."""

    path: str
    layout: Layout
    state: dict[str, Tensor]
    blocks: tuple[str, ...]
    """Prefix of every block, in order."""
    form: str = "dense"
    """`dense`, `unfolded`, `folded`, or `indicators` for a file that lists the FFN units that stay, and no more."""
    kinds: tuple[str, ...] = ()
    """Attention kind of every block; none in an indicator file."""

    @property
    def name(self) -> str:
        """How messages call the file."""
        return f"{'indicator file' if self.form == 'indicators' else 'checkpoint'} {self.path}"

    def classes(self) -> int:
        """Return how many classes the head has; 0 when the file has no head."""
        return next((len(self.state[key]) for key in ("head.weight", "head.fc.weight") if key in self.state), 0)

    def described(self) -> str:
        """Return in words what the file was recognised as."""
        if self.form == "dense":
            return f"dense {self.layout.name} checkpoint"
        what = "FFN indicator file" if self.form == "indicators" else f"fine-tuned SPViT checkpoint, {self.form}"
        return f"published {what}, {self.layout.name} layout"

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose keys start with a prefix, without it."""
        return {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}

    def need(self, key: str, *shape: int) -> Tensor:
        """Return a tensor. Raises CheckpointError when it is missing, or not of the shape, if one is given."""
        if key not in self.state:
            raise CheckpointError(f"{self.name}: {key} is missing")
        found = self.state[key].shape
        if shape and found != shape:
            raise CheckpointError(f"{self.name}: {key} is {list(found)}, expected {list(shape)}")
        return self.state[key]


def read_published(path: str | Path) -> Published:
    """Read a file and recognise what it is. Raises CheckpointError when it is damaged, or of no known layout."""
    state = read_weights(path)
    for layout in (DEIT, SWIN):
        matches = {match[0]: match for key in state if (match := re.match(layout.block + r"(?=\.)", key))}
        if not matches:
            continue
        blocks = tuple(sorted(matches, key=lambda prefix: [int(number) for number in matches[prefix].groups()]))
        file = Published(str(path), layout, state, blocks)
        if all(key.endswith(INDICATOR) for key in state):
            return replace(file, form="indicators")
        forms, kinds = zip(*(_attention_form(file, prefix) for prefix in blocks))
        if "dense" in forms and set(forms) != {"dense"}:
            odd = next(prefix for prefix, form in zip(blocks, forms) if form != "dense")
            raise CheckpointError(f"{file.name}: {odd}.attn has no qkv, expected it in all blocks or none")
        return replace(file, form="folded" if "folded" in forms else forms[0], kinds=kinds)
    expected = "DeiT's keys (blocks.0...) or Swin's (layers.0.blocks.0...)"
    raise CheckpointError(f"checkpoint {path} is of no known layout: expected {expected}, found {next(iter(state))}")


def _attention_form(file: Published, prefix: str) -> tuple[str, str]:
    """Return what a block's attention says of the form of the file, and its kind."""
    names = tuple(sorted({key.partition(".")[0] for key in file.below(f"{prefix}.attn.")} - set(_BESIDE)))
    if names not in _FORMS:
        expected = "; ".join(", ".join(form) for form in _FORMS if form)
        raise CheckpointError(f"{file.name}: {prefix}.attn holds {', '.join(names)}, expected one of: {expected}")
    form, kind = _FORMS[names]
    if form == "folded":
        key = f"{prefix}.attn.bconv.0.weight"
        shape = tuple(file.need(key).shape)
        if shape[2:] not in _KERNELS:
            raise CheckpointError(f"{file.name}: {key} is {list(shape)}, expected a 3 x 3 or 1 x 1 convolution")
        kind = _KERNELS[shape[2:]]
    return form, kind


def model_name(published: Published) -> str:
    """Return the timm model that a checkpoint's shapes fit. Raises CheckpointError for another size."""
    family = published.layout.name
    stages = Counter(prefix.rpartition("blocks.")[0] for prefix in published.blocks)
    own = len(published.need("patch_embed.proj.weight")), list(stages.values())
    known = {}
    for name, architecture in architectures().items():
        if family.lower() in name:
            widths = Counter(block.ffn.width for block in architecture.blocks)  # four times that of the tokens
            known[host_name(name)] = min(widths) // 4, list(widths.values())
    for model, sizes in known.items():
        if own == sizes:
            return model.replace("_patch", "_distilled_patch") if "dist_token" in published.state else model
    listed = ", ".join(f"{model.split('_')[1]}: {width} and {depths}" for model, (width, depths) in known.items())
    raise CheckpointError(
        f"{published.name} has width {own[0]} and {own[1]} blocks, expected a {family} of a known size "
        f"({listed}); name its timm model with --model"
    )


def architecture_name(widths: Sequence[int]) -> str | None:
    """Return the name of the published architecture whose FFNs keep so many units, or None."""
    return next((name for name, item in architectures().items() if item.widths() == tuple(widths)), None)


def indicated_architecture(indicators: Published, host: nn.Module | None = None) -> Architecture:
    """Return the architecture of an indicator file, which has to fit the host if there is one.

    The file does not list attention layers. If its widths are those of a published architecture, attention is as there;
    otherwise all attention stays.

    Raises:
        CheckpointError: the file is no indicator file, holds other values than zeros and ones, or does not fit.
    """
    where = indicators.name
    if indicators.form != "indicators":
        expected = f"keys such as {indicators.blocks[0]}.{INDICATOR} alone"
        raise CheckpointError(f"{where}: expected {expected}, found a {indicators.described()}")
    sites = _fitting_sites(indicators, host) if host is not None else None
    ffns = []
    for index, prefix in enumerate(indicators.blocks):
        vector = indicators.state[f"{prefix}.{INDICATOR}"].float()
        # The published code stores 1 - s + s, which rounding leaves near one.
        if vector.dim() != 1 or not torch.isclose(vector, (vector > 0.5).float(), atol=1e-3).all():
            found = f"{prefix}.{INDICATOR} {list(vector.shape)}"
            raise CheckpointError(f"{where}: {found} is not a vector of zeros and ones")
        if sites is not None and len(vector) != sites[index].ffn.units:
            site, found = sites[index].ffn, f"a vector of {len(vector)} units"
            raise CheckpointError(
                f"{where} does not fit: it has {found} for {site.linears[0]}, but the model {site.units}"
            )
        ffns.append(FFN(len(vector), tuple((vector > 0.5).nonzero().flatten().tolist())))
    name = architecture_name([len(ffn.units) for ffn in ffns])
    known = dense([ffn.width for ffn in ffns]) if name is None else architectures()[name]
    return replace(known, blocks=tuple(replace(block, ffn=ffn) for block, ffn in zip(known.blocks, ffns)))


def rebuild(published: Published, host: nn.Module, indicators: Published | None = None) -> nn.Module:
    """Return the model of a checkpoint: dense, or pruned with the batch norms of its convolutions kept.

    The host is a dense timm model of its size, and stays as it is. The indicators are the FFN units to keep of a dense
    checkpoint, or those that a fine-tuned one kept; without them the first units of every FFN stand for these.

    Raises:
        CheckpointError: the checkpoint or the indicators do not fit the host.
    """
    where = published.name
    if published.form == "indicators":
        found = f"{published.path} is a {published.described()}"
        raise CheckpointError(f"{found}, expected weights; name it with --indicators")
    sites = _fitting_sites(published, host)
    indicated = indicated_architecture(indicators, host) if indicators is not None else None
    dtype = next((value.dtype for value in published.state.values() if value.is_floating_point()), None)
    model = copy.deepcopy(host).to(dtype).eval()
    state = timm_state(model, published.state, published.path)
    if published.form == "dense":
        fit_state(model, state, published.path)
        return model if indicated is None else prune(model, indicated, inplace=True)
    if published.form == "folded" and published.layout is SWIN:
        logging.getLogger("spvit").warning(
            "%s: the published script folds Swin with DeiT's alpha and centre, so its convolutions are wrong already; "
            "convert the unfolded checkpoint",
            published.path,
        )
    state = {key: value for key, value in state.items() if ".attn." not in key}
    blocks = []
    for index, (prefix, kind, site) in enumerate(zip(published.blocks, published.kinds, sites)):
        count = len(published.need(f"{prefix}.mlp.fc1.weight"))
        if count > site.ffn.units:
            own = f"{prefix}.mlp.fc1 has {count} units"
            raise CheckpointError(f"{where} does not fit: {own}, but the model has {site.ffn.units} there")
        units = tuple(range(count)) if indicated is None else indicated.blocks[index].ffn.units
        if indicators is not None and len(units) != count:
            kept = f"it keeps {len(units)} units of {prefix}.mlp"
            raise CheckpointError(f"{indicators.name} does not fit: {kept}, but {where} has {count}")
        blocks.append(Block(Attention(kind), FFN(site.ffn.units, units)))
        layer = _converted(published, f"{prefix}.attn.", kind, site.attention)
        state |= {f"{prefix}.attn.{key}": value for key, value in layer.items()}
    skip_rule = "normalised_input" if "skip" in published.kinds else "zero"
    model = prune(model, Architecture(tuple(blocks), skip_rule=skip_rule), inplace=True)
    fit_state(model, state, published.path)
    return model


def _fitting_sites(published: Published, host: nn.Module) -> Sequence[BlockSites]:
    """Return the sites of a host whose blocks are those of a file. Raises CheckpointError for other blocks."""
    sites, found = Host.of(host).blocks, published.blocks
    paths = [site.attention.path.removesuffix(".attn") for site in sites]
    if list(found) != paths:
        blocks = f"{len(found)} blocks, {found[0]} to {found[-1]}"
        own = f"this {type(host).__name__} has {len(paths)}, {paths[0]} to {paths[-1]}"
        raise CheckpointError(f"{published.name} does not fit: it has {blocks}, but {own}")
    return sites


def _converted(published: Published, prefix: str, kind: str, site: AttentionSite) -> dict[str, Tensor]:
    """Return the weights of a fine-tuned attention layer under the names that they have in the pruned one."""
    if kind == "skip":
        return {}
    part = published.below(prefix)
    if kind == "msa":  # query, key and value projections are packed: qkv.weight [3 D, D]
        own = {key: value for key, value in part.items() if key.startswith(("proj.", _BESIDE[0]))}
        for name, shape in (("weight", (site.dim,)), ("bias", ())):
            if name == "weight" or "qk.bias" in part or "v.bias" in part:
                query_key = published.need(f"{prefix}qk.{name}", 2 * site.dim, *shape)
                own[f"qkv.{name}"] = torch.cat([query_key, published.need(f"{prefix}v.{name}", site.dim, *shape)])
        return own
    own = {"bn.num_batches_tracked": torch.tensor(0)}
    for old, new in _LAYERS.items():
        own |= {f"{new}.{key}": value for key, value in published.below(f"{prefix}{old}.").items()}
    if "bconv.0.weight" not in part:
        return own | _unfolded(published, prefix, kind, site)
    own["conv_out.weight"] = published.need(f"{prefix}bconv.3.weight").flatten(1)
    if kind == "conv1":
        own["conv_in.weight"] = part["bconv.0.weight"].flatten(1)
    return own


def _unfolded(published: Published, prefix: str, kind: str, site: AttentionSite) -> dict[str, Tensor]:
    """Return a convolution's two layers from the projections [D, D] and the head mix [H, K] that it is stored as."""
    dim, by_head, layout = site.dim, (site.heads, site.head_width), published.layout
    head_logits = published.need(f"{prefix}head_probs", site.heads, POSITIONS)[:, list(layout.columns)]
    value = published.need(f"{prefix}v.weight", dim, dim).unflatten(0, by_head)
    out = published.need(f"{prefix}proj.weight", dim, dim).unflatten(1, by_head)
    biased, none = f"{prefix}v.bias" in published.state, value[:, :0]  # a convolution has no queries and keys
    bias = published.need(f"{prefix}v.bias", dim).unflatten(0, by_head) if biased else None
    shared = AttentionWeights(none, None, none, None, value, bias, out, published.state.get(f"{prefix}proj.bias"))
    mix = head_mix(head_logits, layout.temperature)
    weights = conv3_weights(mix, shared) if kind == "conv3" else conv1_weights(mix, shared)
    return {f"conv_{name.replace('_', '.')}": value for name, value in vars(weights).items()}  # conv_in.weight, ...
