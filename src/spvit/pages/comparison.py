"""The dense and the pruned network on some validation images: whose answer changed, and where they look.

Shapes: B images, H heads, N tokens, M tokens attended to, G grid tokens.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from spvit.checkpoint import WEIGHTS, Preprocessing, load
from spvit.errors import RunFolderError
from spvit.hosts.behaviour.watch import Core, watch
from spvit.hosts.grid import GatheredGrid
from spvit.hosts.host import Host, input_size, outputs_of
from spvit.hosts.recognise import family_of
from spvit.hosts.sites import AttentionSite
from spvit.hosts.walk import evaluating
from spvit.pages.contents import Contents, attempted, dense_model
from spvit.surgery import pruned_record
from spvit.train.data import load_images
from spvit.train.drawing import Mark, Picture, word
from spvit.train.settings import ImageConfig

BATCH = 32
SHOWN, LOOKED_AT = 8, 4
"""Images whose answer changed, and images with attention, that the page shows."""
TILE, SPACE, LINE, ACROSS = 112, 8, 17, 4
LETTERS = 15
"""Letters of a class name that a tile is wide."""
GLOW = ("#16103c", "#fcdc78", "#bc3754")
"""Colours of no attention, of the most, and of half; their brightness rises evenly."""


Captions = dict[int, tuple[str, ...]]
"""Lines below an image, by its number."""


def compared(contents: Contents, host: nn.Module | Host | None, images: int | Tensor) -> tuple[str, list[Picture]]:
    """Return how alike two networks answer, in words and pictures, on some of the run's validation images or others.

    Raises RunFolderError when a model or the images are not to be found, and what opening them raises.
    """
    if not (contents.folder.path / WEIGHTS).is_file():
        raise RunFolderError("the run has written no model yet")
    about = contents.description
    if host is not None:
        dense = host.model if isinstance(host, Host) else host
    else:
        dense = dense_model(contents.folder, contents.settings, len(about.classes) if about and about.classes else None)
    small = load(contents.folder.path, host=None if host is None else dense).to(next(dense.parameters()).device)
    if pruned_record(small) is None:
        raise RunFolderError("the model of this run is not pruned")
    shown: Any = [(image, None) for image in images] if isinstance(images, Tensor) else _chosen(contents, dense, images)
    preprocessing = (about and about.preprocessing) or Preprocessing()
    with evaluating(dense, small):
        answers = [_answers(model, shown) for model in (dense, small)]
        if family_of(dense).classes(dense) < 2:
            says, captions, words = _of_features(answers)
        else:
            classes = (about and about.classes) or tuple(map(str, range(answers[0].shape[1])))
            says, captions, words = _of_classes(answers, [label for _, label in shown], classes)
        some = torch.stack([shown[index][0] for index in range(0, len(shown), -(-len(shown) // LOOKED_AT))])
        looks = attempted(
            contents.problems, "attention", lambda: [_attention(dense, small, some, preprocessing)], list[Picture]()
        )
    moved = {index: shown[index][0] for index in list(captions)[:SHOWN]}
    return says, [*_gallery(words, moved, captions, preprocessing), *looks]


def _of_features(answers: Sequence[Tensor]) -> tuple[str, Captions, tuple[str, str]]:
    """Return how far features moved, and captions by image, those that moved most first."""
    cosines = torch.cosine_similarity(answers[0].flatten(1), answers[1].flatten(1))
    captions: Captions = {index: (f"cosine {cosines[index]:.3f}",) for index in cosines.argsort().tolist()}
    worst = f"{cosines.mean():.3f}, at worst {cosines.min():.3f}"
    says = f"On {len(cosines):,} images the mean cosine of dense and pruned features is {worst}."
    return says, captions, ("Images whose features moved most", "The cosine between dense and pruned.")


def _of_classes(
    answers: Sequence[Tensor], labels: Sequence[int | None], classes: Sequence[str]
) -> tuple[str, Captions, tuple[str, str]]:
    """Return how many first guesses changed, and captions of these by image."""
    first, second = (answer.argmax(1).tolist() for answer in answers)
    changed = [index for index, (before, now) in enumerate(zip(first, second)) if before != now]
    says = f"{len(changed):,} of {len(first):,} images get another prediction than from the dense network"
    if changed and None not in labels:
        wrong, right = (sum(guesses[index] == labels[index] for index in changed) for guesses in (first, second))
        says += f": {right:,} of them turn right, {wrong:,} turn wrong"
    captions: Captions = {}
    for index in changed:
        label, guesses = labels[index], f"{_cut(classes[first[index]])} → {_cut(classes[second[index]])}"
        captions[index] = (guesses,) if label is None else (f"is {_cut(classes[label])}", guesses)
    about = "Below each its class, if it is known, and the dense → the pruned network's guess."
    return f"{says}.", captions, ("Images whose prediction changed", about)


def _cut(name: str) -> str:
    return name if len(name) <= LETTERS // 2 + 3 else f"{name[: LETTERS // 2 + 2]}…"


def _chosen(contents: Contents, model: nn.Module, most: int) -> list[tuple[Tensor, int | None]]:
    """Return so many of the run's validation images at most, evenly from all, with their classes; none is downloaded.

    Those that cannot be read are left out where the run leaves them out.
    """
    source, given = contents.settings.get("data"), contents.settings.get("images") or {}
    if not source:
        raise RunFolderError("its settings name no images")
    known = {item.name for item in fields(ImageConfig)}
    values: dict[str, Any] = {key: value for key, value in given.items() if key in known}
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    config = ImageConfig(**{**values, **lists, "download": False})
    preprocessing = contents.description.preprocessing if contents.description is not None else None
    found = load_images(str(source), config, input_size(model), preprocessing or Preprocessing())
    every: Any = found.validation
    indices = torch.linspace(0, len(every) - 1, min(most, len(every))).long().unique().tolist()
    return [item if found.classes else (item[0], None) for index in indices if (item := every[index]) is not None]


def _answers(model: nn.Module, shown: Sequence[tuple[Tensor, Any]]) -> Tensor:
    """Return what a model answers to images, [images, ...], on the CPU."""
    found = []
    for start in range(0, len(shown), BATCH):
        batch = torch.stack([shown[index][0] for index in range(start, min(start + BATCH, len(shown)))])
        found.append(outputs_of(model(batch.to(next(model.parameters()))))[0].float().cpu())
    return torch.cat(found)


def _attention(dense: nn.Module, small: nn.Module, images: Tensor, preprocessing: Preprocessing) -> Picture:
    """Return where both networks look, in a middle and in the last block whose attention the pruned one keeps.

    Raises RunFolderError when it keeps none, or none that can be read.
    """
    record, names = pruned_record(small), ("dense", "pruned")
    assert record is not None
    kept = [index for index, kind in enumerate(record.architecture.kinds()) if kind == "msa"]
    sites = {index: record.family.sites[index].attention for index in sorted({*kept[len(kept) // 2 :][:1], *kept[-1:]})}
    maps = [_maps(model, sites, images) for model in (dense, small)]
    blocks = [index for index in sites if index in maps[0] and index in maps[1]]
    if not blocks:
        raise RunFolderError("the pruned network keeps no attention, or none that can be read from a pass")
    heads = ["image", *names * len(blocks)]
    marks = [word(name, _left(column) + TILE / 2, 30) for column, name in enumerate(heads)]
    for column, index in enumerate(blocks):
        marks.append(word(f"block {index}", _left(1 + 2 * column) + TILE + SPACE / 2, 13, "ink"))
    for row, image in enumerate(images):
        photo = _photo(image, preprocessing)
        tiles = [photo, *(_lit(photo, own[index][row]) for index in blocks for own in maps)]
        marks += [_tile(tile, _left(column), 38 + row * (TILE + SPACE)) for column, tile in enumerate(tiles)]
    size = (_left(len(heads)) - SPACE, 38 + len(images) * (TILE + SPACE) - SPACE)
    says = "How much each patch is looked at, over all heads: by the prefix tokens, or else by all. Bright is much."
    return Picture("attention", "Where attention looks", says, *size, tuple(marks))


def _maps(model: nn.Module, sites: dict[int, AttentionSite], images: Tensor) -> dict[int, Tensor]:
    """Return how much each patch is looked at, [B, height, width], by block; not where attention cannot be read."""
    weight = next(model.parameters())
    cores = watch(model, images.to(weight.device, weight.dtype)).cores
    found = {}
    for index, site in sites.items():
        core = next((core for core in cores if site.path in core.running and core.scale is not None), None)
        if core is not None:
            found[index] = looked_at(core, site).float().cpu()
    return found


def looked_at(core: Core, site: AttentionSite) -> Tensor:
    """Return how much each grid token is looked at, [B, height, width]: by the prefix tokens, or else by all."""
    logits = core.query @ core.key.mT * (core.scale or 1.0)
    if core.scales is not None:
        logits = logits * core.scales[:, None, None]
    if core.bias is not None:  # the same for every image, of each window
        logits = (logits.unflatten(0, (-1, len(core.bias))) + core.bias).flatten(0, 1)
    weights = logits.softmax(-1)[:, :, : site.prefix_tokens or None].mean((1, 2))[..., None]  # [B x windows, M, 1]
    grid = site.own_grid()
    if isinstance(grid, GatheredGrid):
        weights = weights.unflatten(1, grid.shape)
    return grid.gather(weights, site.prefix_tokens)[..., 0].unflatten(1, site.grid)


def _gallery(
    words: tuple[str, str],
    images: dict[int, Tensor],
    captions: Captions,
    preprocessing: Preprocessing,
) -> Iterator[Picture]:
    """Yield images by their index, with lines below each; nothing where there are none."""
    marks: list[Mark] = []
    high = TILE + LINE * (1 + max((len(captions[index]) for index in images), default=0))
    for place, (index, image) in enumerate(images.items()):
        left, top = _left(place % ACROSS), place // ACROSS * high
        marks.append(_tile(_photo(image, preprocessing), left, top))
        marks += [
            word(line, left, top + TILE + LINE * (1 + row), "ink", "start") for row, line in enumerate(captions[index])
        ]
    if images:
        size = (_left(ACROSS) - SPACE, -(-len(images) // ACROSS) * high)
        yield Picture("changed", *words, *size, tuple(marks))


def _left(column: int) -> int:
    return column * (TILE + SPACE)


def _photo(image: Tensor, preprocessing: Preprocessing) -> Image.Image:
    """Return what a network sees of an image, twice as large as it is shown."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    values = (image.cpu() * std + mean).clamp(0, 1)
    values = values[: 3 if len(values) >= 3 else 1]
    return _resized(values.expand(3, -1, -1).permute(1, 2, 0))


def _resized(shades: Tensor) -> Image.Image:
    """Return shades, 0 to 1, [height, width] or [height, width, 3], as an image of a tile; few pixels are squares."""
    smooth = min(shades.shape[:2]) > 2 * TILE / 8
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return Image.fromarray((255 * shades).byte().contiguous().numpy()).resize((2 * TILE, 2 * TILE), method)


def _lit(photo: Image.Image, shares: Tensor) -> Image.Image:
    """Return an image in grey under the colours of how much its patches [height, width] are looked at."""
    level = (shares - shares.min()) / (shares.max() - shares.min()).clamp(min=1e-12)
    return Image.blend(photo.convert("L").convert("RGB"), ImageOps.colorize(_resized(level), *GLOW), 0.65)


def _tile(image: Image.Image, left: float, top: float) -> Mark:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    uri = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Mark("image", "paper", ((left, top), (TILE, TILE)), uri)
