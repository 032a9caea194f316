"""An image file's bytes to the square that is stored: decoded with care, cropped as in ADM."""

import io
import re
import struct
import warnings
import zlib
from typing import Any

import numpy as np

from data_prep.source import BadSample
from diffmoe_ep.data.manifest import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000  # a few compressed bytes can claim any number of pixels
# What Pillow's decoders raise for bytes that are no image, or half of one.
DECODING = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


def square(content: bytes, size: int, min_side: int) -> np.ndarray:
    """The centre of an image file as (3, size, size) uint8; BadSample when the bytes are no whole image of a fit
    size.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"images need Pillow, which is missing ({error}); pip install 'diffmoe_ep[prep]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own bound on pixels is below; what is odd but decodes is taken
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadSample(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
                if min(width, height) < min_side:
                    raise BadSample(f"{width} x {height} pixels are too small, the shorter side is below {min_side}")
                if max(width, height) > 64 * min(width, height):
                    raise BadSample(f"{width} x {height} pixels are a strip, longer than 64 times its width")
                decoded = image.convert("RGB")
    except BadSample:
        raise
    except (*DECODING, Image.DecompressionBombError) as error:
        told = re.sub(r"\s*<[^<>]* at 0x[0-9a-f]+>", "", str(error))  # the same bytes give the same reason
        raise BadSample(f"does not decode ({type(error).__name__}: {told})") from error
    return centre_crop(decoded, size)


def centre_crop(image: Any, size: int) -> np.ndarray:
    """The centre crop of ADM, of a Pillow image in RGB, as (3, size, size) uint8.

    The image is halved by box averages as long as its shorter side is at least twice `size`, brought to `size` by a
    bicubic filter, and cut. (Smaller images are enlarged by the same filter.)
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Resampling.BICUBIC)
    pixels = np.asarray(image)  # (H, W, 3)
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + size, left : left + size].transpose(2, 0, 1))
