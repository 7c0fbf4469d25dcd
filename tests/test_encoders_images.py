"""Reading images, and the preparation of pixels."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from pycm.encoders import ImagePreprocess, ImageReadError, UnreadableInputError, load_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def pixels(item) -> np.ndarray:
    image = load_image(item)
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def test_path_array_image_and_bytes_agree(tmp_path: Path) -> None:
    path = saved(Image.fromarray(PIXELS), tmp_path / "a.png")
    for item in (path, str(path), PIXELS, Image.fromarray(PIXELS), path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(pixels(item), PIXELS)


# What a viewer does to the stored pixels for each value of the EXIF tag.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(PIXELS), tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(pixels(path), UPRIGHT[orientation](PIXELS))
    np.testing.assert_array_equal(pixels(Image.open(path)), UPRIGHT[orientation](PIXELS))


def test_transparency_is_on_white(tmp_path: Path) -> None:
    alpha = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    rgba = np.dstack([PIXELS, alpha])
    share = alpha[..., None] / 255.0
    expected = PIXELS * share + 255 * (1 - share)
    for item in (saved(Image.fromarray(rgba), tmp_path / "a.png"), rgba):
        assert np.abs(pixels(item) - expected).max() <= 1
    grey = Image.merge("LA", [Image.fromarray(PIXELS[..., 0]), Image.fromarray(alpha)])
    expected = np.repeat(PIXELS[..., :1] * share + 255 * (1 - share), 3, axis=2)
    assert np.abs(pixels(saved(grey, tmp_path / "la.png")) - expected).max() <= 1


def test_palettes(tmp_path: Path) -> None:
    index = RNG.integers(0, 3, (6, 9), dtype=np.uint8)
    image = Image.fromarray(index, mode=None).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 255])
    table = np.array([[10, 20, 30], [200, 100, 50], [0, 0, 255]], np.uint8)
    np.testing.assert_array_equal(pixels(saved(image, tmp_path / "p.png")), table[index])
    table[1] = 255
    np.testing.assert_array_equal(pixels(saved(image, tmp_path / "t.png", transparency=1)), table[index])


def test_transparent_colour_of_an_rgb_png(tmp_path: Path) -> None:
    colour = tuple(int(v) for v in PIXELS[2, 3])
    path = saved(Image.fromarray(PIXELS), tmp_path / "a.png", transparency=colour)
    expected = PIXELS.copy()
    expected[2, 3] = 255
    np.testing.assert_array_equal(pixels(path), expected)


def test_grey_and_bilevel(tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    for item in (grey, grey[..., None], saved(Image.fromarray(grey), tmp_path / "g.png")):
        np.testing.assert_array_equal(pixels(item), expected)
    bits = Image.fromarray(grey > 127)
    expected = np.repeat(((grey > 127) * 255)[..., None], 3, axis=2)
    np.testing.assert_array_equal(pixels(saved(bits, tmp_path / "b.png")), expected)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, name: str) -> None:
    deep = np.linspace(0, 65535, 54).round().astype(np.uint16).reshape(6, 9)
    path = tmp_path / name
    if name.endswith("pgm"):
        path.write_bytes(b"P5 9 6 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(path)
    expected = np.rint(deep / 257.0).astype(np.uint8)
    np.testing.assert_array_equal(pixels(path), np.repeat(expected[..., None], 3, axis=2))


def test_cmyk_jpeg_and_animated_gif(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    cmyk = saved(red.convert("CMYK"), tmp_path / "c.jpg")
    assert np.abs(pixels(cmyk).astype(int) - [255, 0, 0]).max() < 12
    blue = Image.new("RGB", (8, 8), (0, 0, 255))
    path = saved(red, tmp_path / "a.gif", save_all=True, append_images=[blue])
    np.testing.assert_array_equal(pixels(path), np.asarray(red))


def truncated_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()[:3000]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"Dear reader, this is text", "not an image of a known format: it begins with b'Dear reader,'"),
        (truncated_png(), "truncated"),
        (b"\x89PNG\r\n\x1a\n", "not an image|truncated|empty"),
    ],
    ids=["empty", "text", "truncated", "header only"],
)
def test_broken_files(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageReadError, match=reason):
        load_image(path)


def test_unreadable_places_and_samples(tmp_path: Path) -> None:
    with pytest.raises(ImageReadError, match="No such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ImageReadError, match="directory"):
        load_image(tmp_path)
    with pytest.raises(ImageReadError, match="null"):
        load_image("a\0.png")
    path = saved(Image.fromarray(np.zeros((4, 4), np.float32)), tmp_path / "f.tif")
    with pytest.raises(ImageReadError, match="floating point"):
        load_image(path)
    path = saved(Image.fromarray(np.zeros((4, 4), np.int32)), tmp_path / "i.tif")
    with pytest.raises(ImageReadError, match="32-bit integer"):
        load_image(path)


def test_every_cut_of_a_png_is_read_or_reported() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    whole = buffer.getvalue()
    read = 0
    for length in range(1, len(whole)):
        try:
            np.testing.assert_array_equal(pixels(whole[:length]), PIXELS)
            read += 1
        except ImageReadError:
            continue
    assert read <= 20  # cuts in the last checksums (8 bytes) and the end mark (12) lose no pixel


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableInputError([("a.png", "empty")], 5)))
    assert error.errors == [("a.png", "empty")]
    assert str(error) == "1 of 5 images cannot be read: a.png (empty)"


# ImagePreprocess


def test_centre_crop_of_exact_pixels() -> None:
    """Without scaling, the crop is plain indexing and the numbers are (p / 255 - mean) / std."""
    pytest.importorskip("torch")
    picture = RNG.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    prepare = ImagePreprocess(size=(14, 14), crop=0.875, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = (picture[1:15, 5:19] / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    out = prepare(load_image(picture))
    assert out.dtype.is_floating_point
    assert out.shape == (3, 14, 14)
    np.testing.assert_allclose(out.numpy().transpose(1, 2, 0), expected, rtol=1e-5, atol=1e-6)


def test_pad_keeps_all_on_white_and_squash_distorts() -> None:
    black = Image.new("RGB", (40, 10))
    page = np.asarray(ImagePreprocess(size=(20, 20), fit="pad").resized(black))
    np.testing.assert_array_equal(page[:, :, 0], np.pad(np.zeros((5, 20)), ((7, 8), (0, 0)), constant_values=255))
    assert np.asarray(ImagePreprocess(size=(20, 20), fit="squash").resized(black)).max() == 0


@pytest.mark.parametrize(("w", "h"), [(1, 1), (1, 500), (500, 1), (3, 7), (224, 224)])
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_any_shape_of_image(w: int, h: int, fit) -> None:
    colour = (12, 200, 99)
    out = np.asarray(ImagePreprocess(size=(32, 24), fit=fit).resized(Image.new("RGB", (w, h), colour)))
    assert out.shape == (32, 24, 3)
    assert (out == colour).all(axis=2).any()


@pytest.mark.parametrize("wrong", [{"crop": 0.0}, {"crop": 1.5}, {"fit": "zoom"}, {"interpolation": "best"}])
def test_preprocess_arguments(wrong) -> None:
    with pytest.raises(ValueError, match="ImagePreprocess"):
        ImagePreprocess(**wrong)
