"""`spvit check`: what was found in a model and verified, what each part may become, and what not and why."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from spvit.architecture import FFN, Architecture, Attention, Block, dense
from spvit.budget import human
from spvit.cli.options import CheckCommand
from spvit.cli.show import say
from spvit.errors import ModelError, SpvitError
from spvit.hosts.family import Family
from spvit.hosts.host import Host, recognise
from spvit.hosts.rebuild import build, source_of
from spvit.hosts.recognise import said_size
from spvit.hosts.sites import NUMBER, AttentionSite, BlockSites, Rows, alike
from spvit.models import ModelConfig, open_model
from spvit.replacements.install import check_fits
from spvit.search.network import make_searchable
from spvit.surgery import pruned_record

SIZES = ("blocks", "tokens", "heads", "windows", "FFN units")
PARTS = {"queries": "query", "keys": "key", "values": "value", "output": "out"}


def check_command(options: CheckCommand, console: Console) -> None:
    """Print what a model is to spvit: tables, or JSON. Raises UnsupportedHostError where nothing can be done."""
    with Console(stderr=True, quiet=console.quiet).status(f"running {options.model} to see what is in it"):
        found = _found(options)
    if options.json:
        console.print_json(json.dumps(found))
        return
    size, classes = " x ".join(map(str, found["input_size"])), found["classes"]
    costs = f"{human(found['params'])} params, {human(found['macs'])} macs"
    say(
        console,
        f"{options.model}: {found['class']}, found {found['found']}",
        f"images {size}, {f'{classes} classes' if classes else 'no head'}; {costs}",
    )
    console.print(*_tables(found["blocks"]))
    say(console, f"search: {found['search']}")


def _found(options: CheckCommand) -> dict[str, Any]:
    """Return all that is printed of a model, as JSON values."""
    config = ModelConfig(model=options.model, model_args=options.model_args, pretrained=False)
    model = open_model(config, any_family=True, weights=False, code=True).model
    host = _host(model, options)
    how = "by what it does and verified" if type(host.family) is Family else "by its class"
    if pruned_record(model) is not None:
        how += ", before it was pruned"
    blocks, start = [], 0
    for pattern, numbers in alike(host.blocks):
        blocks.append({**_block(pattern, numbers), "may become": _may(host, start)})
        start += max(1, len(numbers))
    return {
        "model": options.model,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "found": how,
        "input_size": host.input_size,
        "classes": host.family.classes(host.model),
        **host.totals,
        "search": _answer(lambda: make_searchable(cast(Any, host), inplace=True)),
        "blocks": blocks,
    }


def _tables(blocks: list[dict[str, Any]]) -> list[Table]:
    """Return what the blocks are, the names in the first of them, and what each may become."""
    sizes = Table(*SIZES)
    for block in blocks:
        sizes.add_row(*(block[name] for name in SIZES))
    names = Table("in", blocks[0]["blocks"])
    for name, value in blocks[0].items():
        if name not in (*SIZES, "may become"):
            names.add_row(name, value)
    answers = [block["may become"] for block in blocks]
    distinct = [answer for index, answer in enumerate(answers) if answer not in answers[:index]]
    own = [", ".join(block["blocks"] for block in blocks if block["may become"] == answer) for answer in distinct]
    may = Table("may become", *(own if len(own) > 1 else ["all blocks"]))
    for name in distinct[0]:
        may.add_row(name, *(answer[name] for answer in distinct))
    return [sizes, names, may]


def _host(model: nn.Module, options: CheckCommand) -> Host:
    """Return the dense host that a model is, or was before it was pruned."""
    record = pruned_record(model)
    if record is not None:
        return Host(build(source_of(model)), record.family)
    said = said_size(model)
    channels, size = options.channels or said[0], said[1]
    if options.image_size is not None:
        sides = re.fullmatch(r"(\d+)(?:x(\d+))?", options.image_size)
        if sides is None:
            raise ModelError(f"image_size is {options.image_size}, expected height and width, such as 224x224")
        size = (int(sides[1]), int(sides[2] or sides[1]))
    elif size is None:
        raise ModelError(f"{options.model} does not say what images it takes; give their size: --image-size 224x224")
    host = recognise(model, torch.zeros(1, channels, *size))
    given = options.channels or options.image_size
    if given and host.input_size != (channels, *size):
        expected = " x ".join(map(str, host.input_size))
        raise ModelError(f"{options.model} takes images of {expected}; other sizes are arguments: --model-args")
    return host


def _block(block: BlockSites, numbers: list[int]) -> dict[str, Any]:
    """Return what was found of a block, or of several that are alike, in words by part."""
    site, ffn = block.attention, block.ffn
    units = [f"{rows.linear}{f' from row {rows.start}' if rows.start else ''}" for rows in ffn.first]
    span = f"{{{numbers[0]}..{numbers[-1]}}}" if len(numbers) > 1 else "".join(map(str, numbers))
    return {
        "blocks": block.path.replace(NUMBER, span),
        "tokens": f"{site.prefix_tokens} + {site.grid[0]} x {site.grid[1]}",
        "heads": f"{site.heads} x {site.head_width}, on {site.dim}",
        "windows": f"{site.windows} of {site.keys}" if site.windows > 1 else "none",
        "FFN units": f"{ffn.units}{', gated' if len(ffn.first) > 1 else ''}",
        "attention": site.path,
        **{name: _rows(site, part) for name, part in PARTS.items()},
        "acting on them": _acting(site),
        "norm before": site.norm or "none of its own",
        "FFN": f"{', '.join(units)}, then {ffn.second}",
        "norm of units": ffn.norm or "none",
    }


def _rows(site: AttentionSite, part: str) -> str:
    rows: Rows = getattr(site, part)
    if part in ("query", "key") and rows == site.value:
        return "more than a projection acts on them"
    start = f" from {'column' if part == 'out' else 'row'} {rows.start}" if rows.start else ""
    order = ", not head after head" if rows.by_head is not None or rows.by_dim != 1 else ""
    return f"{rows.weight}{start}{order}; {rows.bias or 'no bias'}"


def _acting(site: AttentionSite) -> str:
    """Return what acts on queries, keys and values beside the projections: norms, and what has a class of its own."""
    norms = [name for name in (*site.norms, site.inner_norm) if name is not None]
    parts = [item.name for item in dataclasses.fields(site) if item.name not in (*PARTS.values(), "layout")]
    others = [part for part in parts if dataclasses.is_dataclass(getattr(site, part))]
    others += [words for words, acts in (("cosine", site.cosine), ("learned scales", site.head_scales)) if acts]
    if not (site.narrows_queries or site.narrows_values):
        unknown = "queries and keys" if site.query == site.value else "logits, or the form of its windows,"
        others = [*others, f"something on {unknown} that no norm, table or argument explains: attention stays whole"]
    return ", ".join([*norms, *others]) or "nothing"


def _may(host: Host, index: int) -> dict[str, str]:
    """Return what may stand in a block: by name "yes", or "no" and why."""
    site, ffn = host.blocks[index].attention, host.blocks[index].ffn
    half = max(1, site.head_width // 2)
    kinds = {
        "fewer heads": Attention(heads=(0,)),
        "narrower values": Attention(value_rank=half),
        "narrower queries, keys": Attention(query_key_rank=half),
        "3 x 3 convolution": Attention("conv3"),
        "1 x 1 convolution": Attention("conv1"),
        "no attention": Attention("skip"),
    }
    whole = FFN.whole(ffn.units)
    blocks = {name: Block(attention, whole) for name, attention in kinds.items()}
    blocks["fewer FFN units"] = Block(Attention(), FFN(ffn.units, (0,)))
    every = dense([block.ffn.units for block in host.blocks]).blocks

    def check(block: Block) -> None:
        check_fits(host, Architecture((*every[:index], block, *every[index + 1 :])))

    return {name: _answer(partial(check, block)) for name, block in blocks.items()}


def _answer(attempt: Callable[[], object]) -> str:
    """Return "yes", or "no" and what an attempt raised."""
    try:
        attempt()
    except SpvitError as error:
        return f"no: {re.sub(r'^block [0-9]+: ', '', str(error))}"
    return "yes"
