"""Sites to and from JSON: what is written is read again, and what is odd is refused by the name of its field."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest

from spvit.errors import CheckpointError
from spvit.fields import from_data, to_data
from spvit.hosts.family import Family
from spvit.hosts.grid import Grid
from spvit.hosts.sites import AttentionSite, BlockSites, FFNSite, Rows, UnitRows, alike


def block(number: int, **changes: Any) -> BlockSites:
    """Return sites with something in every kind of field."""
    path = f"stages.1.blocks{number}"
    site = AttentionSite(
        path=f"{path}.attn",
        norm=f"{path}.norm1",
        query=Rows("qkv.weight", "q_bias", by_head=24),
        key=Rows("qkv.weight", None, 8, by_head=24),
        value=Rows("qkv.weight", "v_bias", 16, by_head=24, by_dim=1),
        out=Rows("proj.weight"),
        dim=24,
        heads=3,
        head_width=8,
        prefix_tokens=1,
        grid=(4, 6),
        keys=25,
        scale=0.3535533905932738,
        norms=("q_norm", None, None),
        parameters=("x", "mask"),
    )
    ffn = FFNSite((UnitRows(f"{path}.w12"), UnitRows(f"{path}.w12", 72)), f"{path}.w3", 72)
    return BlockSites(path, replace(site, **changes), ffn)


FAMILY = Family("ViT", tuple(block(number) for number in range(12)), (3, 32, 48), "embed", 7)


@dataclass
class Gathered(Grid):
    """A layout with fields of its own, as a family may have."""

    index: tuple[int, ...] = ()


def test_families_are_read_as_they_were_written() -> None:
    text = json.dumps(to_data(FAMILY))
    assert from_data(Family, json.loads(text), "family") == FAMILY
    assert "dropout" not in text


def test_blocks_are_together_where_only_their_number_differs() -> None:
    blocks = (block(0), block(1), block(2, heads=4), block(3), block(4))
    assert [numbers for _, numbers in alike(blocks)] == [[0, 1], [2], [3, 4]]
    assert alike(blocks)[0][0].attention.path == "stages.1.blocks{}.attn"
    odd = replace(block(0), path="trunk")
    assert alike([odd]) == [(odd, [])]
    for sites in (blocks, (odd,)):
        family = replace(FAMILY, sites=sites)
        assert from_data(Family, to_data(family), "family") == family


def test_parts_of_other_classes_are_named() -> None:
    layout = Gathered(4, 6, index=(2, 0, 1))
    family = replace(FAMILY, sites=(block(0, layout=layout),))
    data = to_data(family)
    assert data["sites"][0]["attention"]["layout"] == {"class": "Gathered", "height": 4, "width": 6, "index": [2, 0, 1]}
    found = from_data(Family, data, "family").sites[0].attention.layout
    assert type(found) is Gathered
    assert found == layout


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("size",), [3, 32], r"family\.size is \[3, 32\], expected a list of 3"),
        (("size",), "32", r"family\.size is '32', expected a list of 3"),
        (("name",), 3, r"family\.name is 3, expected text"),
        (("colour",), 3, r"family: unknown field 'colour', expected name, sites, size"),
        (("name",), ..., r"family: field 'name' is missing"),
        (("sites",), {}, r"family\.sites is \{\}, expected a list$"),
        (("sites", 0), 5, r"family\.sites\[0\] is 5, expected an object"),
        (("sites", 0, "attention", "heads"), True, r"sites\[0\]\.attention\.heads is True, expected a whole number"),
        (("sites", 0, "attention", "heads"), None, r"attention\.heads is None, expected a whole number"),
        (("sites", 0, "attention", "norm"), 1, r"attention\.norm is 1, expected text or null"),
        (("sites", 0, "attention", "query", "bias"), [], r"attention\.query\.bias is \[\], expected text or null"),
        (("sites", 0, "attention", "grid", 1), 2.5, r"attention\.grid\[1\] is 2\.5, expected a whole number"),
        (("sites", 0, "attention", "narrows_values"), 1, r"narrows_values is 1, expected true or false"),
        (("sites", 0, "attention", "layout"), {"class": "os.system"}, r"layout\.class is 'os\.system', expected one "),
        (("sites", 0, "ffn", "first", 0, "linear"), ..., r"ffn\.first\[0\]: field 'linear' is missing"),
    ],
)
def test_odd_fields_are_refused_by_name(path: tuple[Any, ...], value: Any, message: str) -> None:
    data = copy.deepcopy(to_data(FAMILY))
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    if value is ...:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        from_data(Family, data, "family")


def test_what_no_file_can_hold_is_refused() -> None:
    with pytest.raises(CheckpointError, match="object .* cannot be written to a file"):
        to_data(replace(FAMILY, name=object()))


def test_whole_numbers_are_numbers() -> None:
    found = from_data(Family, {**to_data(FAMILY), "temperature": 1}, "family").temperature
    assert (found, type(found)) == (1.0, float)
