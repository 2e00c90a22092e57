"""Architectures: exact JSON round trips, the published ones, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import spvit
from spvit.architecture import (
    FFN,
    KINDS,
    Architecture,
    Attention,
    Block,
    architecture_from_dict,
    dense,
)
from spvit.errors import ArchitectureError

EVERYTHING = Architecture(
    (
        Block(Attention("msa", (0, 2), 5, 3), FFN(8, (0, 7))),
        Block(Attention("conv3"), FFN(8, ())),
        Block(Attention("conv1"), FFN(4, (0, 1, 2, 3))),
        Block(Attention("skip"), FFN(1, (0,))),
        Block(Attention("msa", value_rank=2), FFN(8, (1, 2)), "prefix"),
    ),
    skip_rule="normalised_input",
)

# method.md section 6: width of the first FFNs; m, 3, 1 or s a block, stages split by a bar; FFN units kept.
PUBLISHED = {
    "spvit_deit_tiny_patch16_224": (
        768,
        "11mmmmmmmmmm",
        "744 758 764 767 766 764 756 659 633 473 179 145",
    ),
    "spvit_deit_small_patch16_224": (
        1536,
        "1mmmmmmmmmmm",
        "1304 1399 1344 1214 1251 1183 1140 925 742 391 104 103",
    ),
    "spvit_deit_base_patch16_224": (
        3072,
        "11133mmmmmmm",
        "1118 489 1050 1345 1336 1326 1431 1564 1606 1702 1290 190",
    ),
    "spvit_deit_base_11g_patch16_224": (
        3072,
        "1113mmmmmmmm",
        "1253 610 1343 1912 2354 2306 2483 2753 2869 2860 2443 934",
    ),
    "spvit_swin_tiny_patch4_window7_224": (
        384,
        "1s|1s|mmmmmm|mm",
        "186 152 646 504 1350 1319 1289 1249 1234 1082 3041 2994",
    ),
    "spvit_swin_small_patch4_window7_224": (
        384,
        "1s|mm|mmmmmmmmmmmms1mmss|mm",
        "188 209 748 680 1159 1260 1127 1036 919 916 868 918 903 937 961 1037 1063 996 888 866 741 509 3064 3051",
    ),
    "spvit_swin_base_patch4_window7_224": (
        512,
        "ms|mm|mmmmmmmsmmmmmms1ms|mm",
        "311 303 1011 980 1763 1673 1636 1523 1410 1377 1332 1345 1440 1426 1400 1315 1371 1321 1324 1265 1127 734 "
        "3572 2931",
    ),
}


@pytest.mark.parametrize("architecture", [EVERYTHING, dense([3, 4]), *spvit.architectures().values()])
def test_json_round_trip_is_exact(architecture: Architecture) -> None:
    text = architecture.to_json()
    assert Architecture.from_json(text) == architecture
    assert Architecture.from_json(text).to_json() == text


def test_json_round_trip_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "architecture.json"
    path.write_text(EVERYTHING.to_json())
    assert Architecture.load(path) == EVERYTHING
    assert Architecture.load(str(path)) == EVERYTHING


def test_architectures_are_values() -> None:
    twin = Architecture.from_json(EVERYTHING.to_json())
    assert hash(twin) == hash(EVERYTHING)
    with pytest.raises(AttributeError):
        twin.skip_rule = "zero"  # type: ignore[misc]


def test_dense_keeps_everything() -> None:
    architecture = dense([3, 5])
    assert architecture.kinds() == ("msa", "msa")
    assert architecture.widths() == (3, 5)
    assert architecture.blocks[1].ffn.units == (0, 1, 2, 3, 4)


def test_prints_as_a_table_of_blocks() -> None:
    rows = [line.split() for line in str(EVERYTHING).splitlines()]
    assert rows[0] == ["block", "attention", "FFN", "units"]
    assert rows[1] == ["0", "msa", "2", "heads", "5/3", "2", "of", "8"]
    assert rows[2] == ["1", "conv3", "0", "of", "8"]
    assert rows[5] == ["4", "msa", "all/2", "2", "of", "8,", "for", "prefix", "tokens", "alone"]
    assert len(rows) == 1 + len(EVERYTHING.blocks)


def test_published_architectures() -> None:
    letters = {kind: kind[0] if kind in ("msa", "skip") else kind[-1] for kind in KINDS}
    assert spvit.architectures().keys() == PUBLISHED.keys()
    for name, (width, attention, units) in PUBLISHED.items():
        architecture = spvit.architectures()[name]
        assert "".join(letters[kind] for kind in architecture.kinds()) == attention.replace("|", "")
        assert " ".join(map(str, architecture.widths())) == units
        stages = [width * 2**stage for stage, blocks in enumerate(attention.split("|")) for _ in blocks]
        assert [block.ffn.width for block in architecture.blocks] == stages
        assert architecture.skip_rule == ("normalised_input" if "swin" in name else "zero")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention("conv5"), "attention kind 'conv5' is unknown, expected one of msa, conv3, conv1, skip"),
        (lambda: Attention("conv3", heads=(0,)), "attention heads goes with kind msa only, found it with conv3"),
        (lambda: Attention("skip", value_rank=1), "attention value_rank goes with kind msa only, found it with skip"),
        (lambda: Attention(query_key_rank=0), "attention query_key_rank: found 0, expected a whole number, 1 or more"),
        (lambda: Attention(value_rank=True), "attention value_rank: found True, expected a whole number"),
        (lambda: Attention(heads=()), "attention heads: found none, expected one or more; the kind without is skip"),
        (lambda: Attention("msa", heads=(-1,)), "attention heads: index -1 is out of range, expected 0 or more"),
        (lambda: Attention("msa", heads=(1, 1)), "attention heads: index 1 follows 1, expected strictly ascending"),
        (lambda: FFN(0, ()), "FFN width: found 0, expected a whole number of units, 1 or more"),
        (lambda: FFN(True, ()), "FFN width: found True"),
        (lambda: FFN("8", ()), "FFN width: found '8'"),
        (lambda: FFN(8, (8,)), "FFN units: index 8 is out of range, expected from 0 to 7"),
        (lambda: FFN(8, (2, 1)), "FFN units: index 1 follows 2, expected strictly ascending"),
        (lambda: FFN(8, (1.0,)), r"FFN units: found 1\.0, expected whole numbers"),
        (lambda: FFN(8, (False, 1)), "FFN units: found False, expected whole numbers"),
        (lambda: Architecture(()), "an architecture needs at least one block, found none"),
        (lambda: Architecture(EVERYTHING.blocks, prefix_rule="drop"), "prefix_rule 'drop' is unknown, .*identity"),
        (lambda: Architecture(EVERYTHING.blocks, skip_rule="x"), "skip_rule 'x' is unknown, .*zero, normalised_input"),
    ],
)
def test_malformed_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        make()


def _edited(path: list[Any], value: Any = None, remove: bool = False) -> dict[str, Any]:
    """Return EVERYTHING as parsed JSON with one place changed."""
    data = json.loads(EVERYTHING.to_json())
    place = data
    for step in path[:-1]:
        place = place[step]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], 'not an architecture: expected "format": "spvit-architecture", "version": 1'),
        ({}, 'not an architecture: expected "format": "spvit-architecture"'),
        (_edited(["format"], "other"), "not an architecture: expected"),
        (_edited(["version"], 2), "not an architecture: expected"),
        (_edited(["version"], remove=True), "not an architecture: expected"),
        (_edited(["blocks"], remove=True), "architecture: field 'blocks' is missing"),
        (_edited(["blocks"], {}), "architecture.blocks is {}, expected a list"),
        (_edited(["blocks"], []), "at least one block"),
        (_edited(["colour"], 1), "architecture: unknown field 'colour', expected blocks, prefix_rule, skip_rule"),
        (_edited(["skip_rule"], 1), "architecture.skip_rule is 1, expected text"),
        (_edited(["blocks", 1], 3), r"architecture.blocks\[1\] is 3, expected an object"),
        (
            _edited(["blocks", 1, "norm"], 3),
            r"architecture.blocks\[1\]: unknown field 'norm', expected attention, ffn, tokens",
        ),
        (_edited(["blocks", 1, "attention"], remove=True), r"blocks\[1\]: field 'attention' is missing"),
        (_edited(["blocks", 2, "ffn"], remove=True), r"blocks\[2\]: field 'ffn' is missing"),
        (
            _edited(["blocks", 4, "tokens"], "class"),
            r"blocks\[4\]: block tokens 'class' is unknown, expected one of all, pre",
        ),
        (
            _edited(["blocks", 0, "tokens"], "prefix"),
            "block 0: found tokens prefix, expected all; only the last block's",
        ),
        (
            _edited(["blocks", 1, "tokens"], "prefix"),
            r"blocks\[1\]: tokens prefix goes with attention kinds msa and skip only",
        ),
        (
            _edited(["blocks", 1, "attention", "size"], 3),
            r"blocks\[1\]\.attention: unknown field 'size', expected kind, ",
        ),
        (
            _edited(["blocks", 1, "attention", "kind"], "conv5"),
            r"blocks\[1\]\.attention: attention kind 'conv5' is unknown",
        ),
        (
            _edited(["blocks", 0, "attention", "heads"], 3),
            r"blocks\[0\]\.attention\.heads is 3, expected a list or null",
        ),
        (_edited(["blocks", 0, "attention", "heads"], ["a"]), r"attention\.heads\[0\] is 'a', expected a whole"),
        (_edited(["blocks", 1, "ffn"], []), r"blocks\[1\]\.ffn is \[\], expected an object"),
        (_edited(["blocks", 1, "ffn", "bias"], 1), r"blocks\[1\]\.ffn: unknown field 'bias', expected width, units"),
        (_edited(["blocks", 1, "ffn", "width"], remove=True), r"blocks\[1\]\.ffn: field 'width' is missing"),
        (_edited(["blocks", 1, "ffn", "units"], remove=True), r"blocks\[1\]\.ffn: field 'units' is missing"),
        (_edited(["blocks", 1, "ffn", "units"], "all"), r"blocks\[1\]\.ffn\.units is 'all', expected a list"),
        (_edited(["blocks", 1, "ffn", "units"], [9]), r"blocks\[1\]\.ffn: FFN units: index 9 is out of range"),
        (_edited(["blocks", 1, "ffn", "width"], -4), r"blocks\[1\]\.ffn: FFN width: found -4"),
    ],
)
def test_malformed_files_are_refused_by_field(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=message):
        architecture_from_dict(data)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ArchitectureError, match=rf"architecture file .*a\.json: .*{message}"):
        Architecture.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the text is not valid JSON"),
        (b"", "the text is not valid JSON"),
        (b"\xff\xfe\x00", "decode"),
        (None, "No such file"),
    ],
)
def test_unreadable_files_are_refused_by_name(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArchitectureError, match=rf"architecture file .*broken\.json: .*{message}"):
        Architecture.load(path)
    if content == b"{":
        with pytest.raises(ArchitectureError, match="not valid JSON"):
            Architecture.from_json("{")
