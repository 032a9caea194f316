"""Image files to squares: ADM's crop against a reference of its own, and every kind of file that is no image."""

import io
import struct
import zlib

import numpy as np
import pytest

from data_prep.image import centre_crop, square
from data_prep.source import BadSample
from pictures import picture

Image = pytest.importorskip("PIL.Image")


def reference(pixels: np.ndarray, size: int) -> np.ndarray:
    """The same crop, (size, size, 3): the halving by NumPy means, the bicubic step channel by channel, the cut by
    Pillow.
    """
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        assert pixels.shape[0] % 2 == pixels.shape[1] % 2 == 0
        rows = np.floor(
            pixels.reshape(2 * height, width, 2, 3).mean(axis=2) + 0.5
        )  # Pillow rounds after each direction
        pixels = np.floor(rows.reshape(height, 2, width, 3).mean(axis=1) + 0.5).astype(np.uint8)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    target = (round(width * scale), round(height * scale))
    planes = [
        Image.fromarray(np.ascontiguousarray(pixels[:, :, channel])).resize(target, Image.BICUBIC)
        for channel in range(3)
    ]
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    return np.stack([np.asarray(plane.crop((left, top, left + size, top + size))) for plane in planes], axis=2)


@pytest.mark.parametrize(
    ("width", "height", "size"), [(96, 64, 8), (64, 96, 8), (8, 8, 8), (11, 9, 8), (15, 40, 8), (5, 7, 8), (48, 32, 16)]
)
def test_the_crop_is_that_of_adm(width: int, height: int, size: int) -> None:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3)).astype(np.uint8)
    found = centre_crop(Image.fromarray(pixels), size)
    assert found.shape == (3, size, size)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found.transpose(1, 2, 0), reference(pixels, size))


def test_a_square_of_the_right_size_is_left_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    np.testing.assert_array_equal(square(file.getvalue(), 8, 1), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "I;16"])
def test_other_colours_become_rgb(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (10, 12)).save(file, "JPEG" if mode == "CMYK" else "PNG")
    assert square(file.getvalue(), 8, 1).shape == (3, 8, 8)


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return content


def gif() -> bytes:
    file = io.BytesIO()
    Image.new("P", (16, 16)).save(file, "GIF")
    return file.getvalue()


BAD = {
    "nothing": (b"", "does not decode"),
    "text": (b"<html>not found</html>", "does not decode"),
    "half a jpeg": (picture(1, 200, 160, "JPEG")[:900], "does not decode"),
    "half a png": (picture(1, 200, 160)[:900], "does not decode"),
    "half a webp": (picture(1, 200, 160, "WEBP")[:300], "does not decode"),
    "another format": (gif(), "does not decode"),
    "too many pixels": (bomb(50_000), "DecompressionBombError"),
    "too small": (picture(1, 20, 7), "20 x 7 pixels are too small, the shorter side is below 8"),
    "a strip": (picture(1, 8 * 65, 8), "strip"),
}


@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=BAD.keys())
def test_what_is_no_image_is_named(content: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        square(content, 8, 8)


def test_the_bound_on_pixels_holds_below_pillows_own() -> None:
    with pytest.raises(BadSample, match="10001 x 10001 pixels are more than 100,000,000"):
        square(bomb(10_001), 8, 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_damage_is_fatal(kind: str) -> None:
    """Bytes changed anywhere give an image or a BadSample, nothing else."""
    whole, outcomes = picture(2, 40, 30, kind), {"image": 0, "bad": 0}
    generator = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] = generator.integers(0, 256)
        try:
            outcomes["image"] += square(bytes(damaged), 8, 1).shape == (3, 8, 8)
        except BadSample:
            outcomes["bad"] += 1
    assert sum(outcomes.values()) == 150
    assert outcomes["bad"] > 0
