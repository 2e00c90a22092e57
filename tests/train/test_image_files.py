"""Pictures are read as they look: bit depth, transparency, rotation; and what cannot be known is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spvit.errors import DataError
from spvit.train.image_files import read_image
from training import GREY, image_folder

RAMP = np.linspace(0, 1, 16).reshape(4, 4)
EIGHT = np.rint(RAMP * 255).astype(np.uint8)


def assert_reads(source: object, expected: np.ndarray, channels: int = 1, **settings: float) -> None:
    found = np.asarray(read_image(source, channels, **settings))
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    shades = np.rint(RAMP * 65535).astype(np.uint16)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(shades).save(tmp_path / name)
        assert_reads(tmp_path / name, EIGHT)
        assert_reads(tmp_path / name, np.stack([EIGHT] * 3, axis=-1), channels=3)
    (tmp_path / "grey.pgm").write_bytes(b"P5 4 4 65535\n" + shades.astype(">u2").tobytes())
    assert_reads(tmp_path / "grey.pgm", EIGHT)
    assert_reads(shades, EIGHT)


def test_fractions_are_read_from_0_to_1_and_other_numbers_refused(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "a.tif")
    assert_reads(tmp_path / "a.tif", EIGHT)
    for shades, words in (
        (RAMP * 255, r"a\.tif cannot be read \(its shades are 0 to 255, expected 0 to 1; save it with 8"),
        (RAMP - 0.5, "its shades are -0.5 to 0.5, expected 0 to 1"),
        (RAMP * np.nan, "its shades are nan to nan"),
    ):
        Image.fromarray(shades.astype(np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(DataError, match=words):
            read_image(tmp_path / "a.tif", 3)
    Image.fromarray((RAMP * 1e6).astype(np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(DataError, match=r"b\.tif cannot be read \(its shades are integers of 32 bits"):
        read_image(tmp_path / "b.tif", 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_a_background_shows_through(tmp_path: Path, mode: str) -> None:
    """Left half transparent above red, right half opaque grey."""
    picture = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    picture.paste((90, 90, 90, 255), (2, 0, 4, 4))
    more = {}
    if mode == "RGB":  # one colour stands for transparent
        picture, more = picture.convert("RGB"), {"transparency": (200, 0, 0)}
    elif mode == "P":
        picture = picture.quantize(4)
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / "a.png", **more)
    for background, shade in ((1.0, 255), (0.0, 0), (0.5, 128)):
        expected = np.full((4, 4), 90)
        expected[:, :2] = shade
        assert_reads(tmp_path / "a.png", expected, background=background)
        assert_reads(tmp_path / "a.png", np.stack([expected] * 3, axis=-1), channels=3, background=background)


def test_one_shade_of_sixteen_bits_is_transparent(tmp_path: Path) -> None:
    shades = np.array([[40000, 40001], [0, 65535]], dtype=np.uint16)  # the first two are alike in eight bits
    Image.fromarray(shades).save(tmp_path / "a.png", transparency=40000)
    assert_reads(tmp_path / "a.png", np.array([[0, 156], [0, 255]]), background=0.0)
    assert_reads(tmp_path / "a.png", np.array([[255, 156], [0, 255]]), background=1.0)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_shades_of_a_file_in_which_white_is_zero_are_inverted(tmp_path: Path, compression: str | None) -> None:
    fractions = RAMP.astype(np.float32)
    for stored in (EIGHT, np.rint(RAMP * 65535).astype(np.uint16), fractions):
        Image.fromarray(stored).save(tmp_path / "a.tif", compression=compression)
        tag = np.array([262, 3, 1, 0], dtype="<u2").tobytes()  # PhotometricInterpretation, one short number
        content = (tmp_path / "a.tif").read_bytes()
        assert content.count(tag + b"\1\0") == 1
        (tmp_path / "a.tif").write_bytes(content.replace(tag + b"\1\0", tag + b"\0\0"))
        assert_reads(tmp_path / "a.tif", 255 - EIGHT)


def test_the_rotation_that_a_camera_wrote_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    Image.fromarray(EIGHT[:2]).save(tmp_path / "a.png", exif=exif)
    assert_reads(tmp_path / "a.png", np.rot90(EIGHT[:2], -1))


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_a_rotated_tiff_is_read_alike_however_it_is_stored(tmp_path: Path, mode: str) -> None:
    shades = (np.arange(12, dtype=np.uint16).reshape(3, 4) * 20).astype(np.uint16 if mode == "I;16" else np.uint8)
    picture = Image.fromarray(shades * 256 if mode == "I;16" else shades)
    picture = picture.convert("RGB") if mode == "RGB" else picture
    for orientation in range(1, 9):
        for name, compression in (("raw.tif", None), ("lzw.tif", "tiff_lzw")):
            picture.save(tmp_path / name, compression=compression, tiffinfo={274: orientation})
        found = np.asarray(read_image(tmp_path / "raw.tif", 1))
        assert found.shape == ((3, 4) if orientation < 5 else (4, 3))
        assert np.array_equal(found, np.asarray(read_image(tmp_path / "lzw.tif", 1))), orientation


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "two\nlines.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    for name, words in (
        ("pipe.png", r"pipe\.png cannot be read \(it is a folder, a pipe or a device, and no file"),
        ("gone.png", r"gone\.png cannot be read \(No such file"),
        ("two\nlines.png", r"two\\nlines\.png' cannot be read \(Image size \(81 pixels\) exceeds"),
    ):
        with pytest.raises(DataError, match=words) as refusal:
            read_image(tmp_path / name, 3)
        assert "\n" not in str(refusal.value)


def test_data_sets_read_pictures_that_way_and_hidden_files_are_none(tmp_path: Path) -> None:
    from spvit.train.data import ImageConfig, load_images

    root = image_folder(tmp_path)
    for path in root.glob("*/cat/*.png"):
        Image.new("I;16", (8, 8), 32768).save(path)
    for path in root.glob("*/dog/*.png"):
        Image.new("LA", (8, 8), (0, 0)).save(path)
    (root / "train" / "cat" / "._0.png").write_bytes(b"of another program")
    (root / "train" / ".cache").mkdir()
    images = load_images(str(root), ImageConfig(crop=1.0, background=0.25), (1, 8, 8), GREY)
    assert images.classes == ("cat", "dog")
    assert len(images.train) == 8
    shades = {target: image.mean().item() for image, target in images.validation}
    assert shades == {0: pytest.approx(0.0, abs=0.01), 1: pytest.approx(-0.5, abs=0.01)}
