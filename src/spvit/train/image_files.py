"""Reading pictures: any file that Pillow opens becomes grey or RGB of eight bits as the picture looks, or is refused.

`Image.convert` alone clips 16 bits to white, drops transparency, and leaves a camera's rotation to the viewer.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ContainerIO import ContainerIO

from spvit.errors import DataError

_SIXTEEN_BITS = ("PNG", "PPM")  # in these files integers of more than eight bits reach up to 65,535
_PHOTOMETRIC = b"\x06\x01\x03\x00\x01\x00\x00\x00"  # a tag of TIFF files: in 0 white is 0, in 1 black


@dataclass(frozen=True)
class Stored:
    """A picture inside another file, by its name, what opens it, and the path of that file if there is one."""

    name: str
    open: Callable[[], Any]
    file: str = ""

    def __str__(self) -> str:
        return self.name


def part_of(path: str, start: int, end: int) -> Any:
    """Return a part of a file, opened."""
    return ContainerIO(open(path, "rb"), start, end - start)  # it closes with what it is part of


def read_image(source: Any, channels: int, background: float = 1.0) -> Image.Image:
    """Return a picture of a path, an array or a PIL image: upright, grey (1 channel) or RGB, eight bits a channel.

    A background, from 0 (black) to 1 (white), shows through transparent pixels. Raises DataError naming what cannot be
    read, or is of a kind whose black and white are not known.
    """
    with _named(source):
        image = _opened(source)
        inverted = _is_inverted(image)
        if image is source:
            image = ImageOps.exif_transpose(image)  # a copy
        else:
            ImageOps.exif_transpose(image, in_place=True)
        image = _in_eight_bits(image, inverted)
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
            behind = (round(255 * background),) * 3
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*behind, 255)), image)
        return image.convert("L" if channels == 1 else "RGB")


def check_header(source: str | Stored) -> None:
    """Raise DataError when the first bytes of a picture show that it cannot be read."""
    with _named(source), _opened(source):
        pass


@contextmanager
def _named(source: Any) -> Iterator[None]:
    """Let what fails say which picture it was."""
    try:
        yield
    except Exception as error:  # whatever damaged bytes lead to; all of it means the same to the user
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = "it is no image, or damaged" if isinstance(error, UnidentifiedImageError) else reason
        shown = str(source) if str(source).isprintable() else repr(str(source))
        raise DataError(f"image {shown} cannot be read ({reason.splitlines()[0]})") from error


def _opened(source: Any) -> Any:
    """Return a PIL image whose pixels may not have been read yet. Raises ValueError where white is not known."""
    if isinstance(source, Stored):
        image: Any = Image.open(source.open())
    elif isinstance(source, (str, Path)):
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise ValueError("it is a folder, a pipe or a device, and no file")
        image = Image.open(source)
        if image.format == "TIFF":  # Pillow 13 maps a rotated file with its height for its width
            image.filename = ""  # a file without a name is not mapped
    else:
        image = Image.fromarray(source) if isinstance(source, np.ndarray) else source
    if image.mode == "I" and image.format not in _SIXTEEN_BITS:
        raise ValueError("its shades are integers of 32 bits, whose white is not known; save it with 8 or 16 bits")
    return image


def _is_inverted(image: Any) -> bool:
    """Return whether Pillow gives the shades of a TIFF file inverted, as in it white is 0."""
    white_is_zero = getattr(image, "format", None) == "TIFF" and image.tag_v2.get(262) == 0
    return white_is_zero and image.mode in ("I;16", "F") and not _pillow_inverts(image.mode)


@cache
def _pillow_inverts(mode: str) -> bool:
    """Return whether Pillow inverts shades of a mode whose file says that white is 0: 13 does those of 8 bits alone."""
    file = BytesIO()
    Image.new(mode, (1, 1)).save(file, "TIFF")
    told = file.getvalue().replace(_PHOTOMETRIC + b"\1", _PHOTOMETRIC + b"\0")
    return Image.open(BytesIO(told)).getpixel((0, 0)) != 0


def _in_eight_bits(image: Any, inverted: bool) -> Any:
    """Return a picture whose shades are of eight bits. Raises ValueError where it is not known which is white."""
    if image.mode.startswith("I"):
        white = 65535.0
    elif image.mode == "F":
        white = 1.0
    else:
        return image
    shades = np.asarray(image).astype(np.float64)
    if not (shades.min() >= 0 and shades.max() <= white):
        found = f"{shades.min():.4g} to {shades.max():.4g}"
        raise ValueError(f"its shades are {found}, expected 0 to {white:.0f}; save it with 8 or 16 bits")
    shades = white - shades if inverted else shades
    made = Image.fromarray(np.rint(shades * (255 / white)).astype(np.uint8))
    transparent = image.info.get("transparency")  # a shade of 16 bits
    if isinstance(transparent, int):
        made.putalpha(Image.fromarray(np.where(shades == transparent, 0, 255).astype(np.uint8)))
    return made
