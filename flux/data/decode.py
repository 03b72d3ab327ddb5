"""Picture files of strangers -> upright RGB pictures, or the reason why not."""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageFile

from flux.data.errors import BadSample

# Only these parsers run: pictures may come from strangers, and some of Pillow's other formats call outside programs.
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_FILE_BYTES = 64_000_000

# NOTE: Pillow's parsers raise whatever their arithmetic on hostile bytes runs into, not only what they document.
PARSER_FAULTS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError),
    *(ArithmeticError, LookupError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)

# What makes a picture upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = tuple(TURNS[orientation] for orientation in (5, 6, 7, 8))  # width and height change places

Color = tuple[int, int, int]
Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class DecodeRules:
    """What a usable picture is, and how it is decoded; the fields are those of [data].

    `fast_jpeg` decodes JPEG at 1/2, 1/4 or 1/8, the smallest that still covers what is cut from it: the decoder
    inverts smaller cosine transforms, and fewer pixels are left to resize. That changes pixels. Six photographs of
    512 px differ from their bicubic resize by 0.5 to 1.2 of 255 levels in the mean at 1/2, up to 1.5 at 1/4 and 2.2 at
    1/8; single pixels at sharp edges by up to 40. Sides that do not divide come out rounded up: the picture is
    stretched by less than one of its new pixels. Without it, JPEG is decoded as exactly as the other formats.
    """

    min_side: int
    max_aspect: float
    max_megapixels: float
    background: Color
    fast_jpeg: bool


def read_size(data: bytes | BinaryIO) -> Size:
    """(width, height) of the upright picture as the header says; (0, 0) where that is unreadable.

    Nothing is decoded. JPEG and PNG need what stands before the pixels: mostly under 64 kB, more where a color profile
    or a preview is embedded. WebP needs the whole file. A stream is read from its beginning as far as needed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)
            return _swap(image.size) if _read_turn(image) in SIDEWAYS else image.size
    except PARSER_FAULTS:
        return (0, 0)


def decode_image(data: bytes | Image.Image, rules: DecodeRules, cover: Size) -> Image.Image:
    """The upright RGB picture. It may come smaller than stored, but not so that `cover` would have to be enlarged.

    Args:
        data: a JPEG, PNG or WebP file, which is judged by its content; a picture that was drawn passes as it is.
        rules: what is refused before decoding, and how transparency and JPEG are treated.
        cover: (width, height) that will be cut from it.

    Raises:
        BadSample: it cannot be used. Key and shard are not set.
        ValueError: Pillow is set to make pictures of truncated files.
    """
    if isinstance(data, Image.Image):
        return data
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES=True fills cut pictures with gray, and they would be trained on: "
            "leave it False"
        )
    if len(data) > MAX_FILE_BYTES:
        raise BadSample("too_large", f"a file of {len(data):,} bytes, and {MAX_FILE_BYTES:,} are allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on broken EXIF, and on sizes that data.max_megapixels allows
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_header(image, rules)
            turn = _read_turn(image)
            if rules.fast_jpeg:
                image.draft(None, _swap(cover) if turn in SIDEWAYS else cover)  # does nothing to other formats
            image.load()
            return convert_to_rgb(image if turn is None else image.transpose(turn), rules.background)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too_large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise BadSample("damaged", f"no header of {', '.join(FORMATS)}: it begins with {data[:16]!r}") from error
    except PARSER_FAULTS as error:
        raise BadSample("damaged", f"does not decode: {str(error) or type(error).__name__}") from error


def convert_to_rgb(image: Image.Image, background: Color) -> Image.Image:
    """RGB of any color mode: transparency laid over the background, 16-bit gray scaled instead of clipped."""
    if image.mode.startswith(("I", "F")):
        image = _scale_gray(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def parse_color(text: str) -> Color:
    """(red, green, blue) in 0..255 of `#rrggbb`, `#rgb` or a name of CSS.

    Raises:
        ValueError: it is none of these.
    """
    try:
        red, green, blue = bytes(ImageColor.getrgb(text))  # each in 0..255, and three of them: no transparency
    except ValueError as error:
        raise ValueError(f"data.background={text!r} must be an opaque color such as '#ffffff' or 'white'") from error
    return red, green, blue


def _swap(size: Size) -> Size:
    return size[1], size[0]


def _read_turn(image: Image.Image) -> Image.Transpose | None:
    """What makes it upright. A broken EXIF block leaves it as it is stored."""
    try:
        # NOTE: PNG's own getexif decodes the whole picture to find a block behind its pixels; this reads the header.
        return TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except PARSER_FAULTS:
        return None


def _check_header(image: Image.Image, rules: DecodeRules) -> None:
    """Raises BadSample for what can be told before the pixels are decoded."""
    width, height = image.size
    shown = f"{width} x {height} pixels"
    if min(width, height) < rules.min_side:
        raise BadSample("too_small", f"{shown}, and data.min_side={rules.min_side}")
    if max(width, height) > rules.max_aspect * min(width, height):
        raise BadSample("too_long", f"{shown}, and data.max_aspect={rules.max_aspect:g}")
    if width * height > rules.max_megapixels * 1e6:
        raise BadSample("too_large", f"{shown}, and data.max_megapixels={rules.max_megapixels:g}")
    # Phones store photographs as MPO: a JPEG with more pictures, such as a depth map, behind it.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise BadSample("animated", f"it has {frames} frames")


def _scale_gray(image: Image.Image) -> Image.Image:
    """8-bit gray, with alpha where one level is declared transparent, of 16-bit gray."""
    # NOTE: Pillow's own conversion clips everything above 255 to white.
    levels_HW = np.asarray(image, dtype=np.float64)
    gray = Image.fromarray(np.round(levels_HW / 257).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        gray.putalpha(Image.fromarray(np.where(levels_HW == image.info["transparency"], 0, 255).astype(np.uint8)))
    return gray
