"""Picture files with everything that strangers do to them, and what must be said of each.

Judged by `RULES`; None means that the picture is used.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from flux.data.decode import DecodeRules
from flux.data.errors import Reason

RULES = DecodeRules(min_side=16, max_aspect=8.0, max_megapixels=64.0, background=(255, 255, 255), fast_jpeg=True)


def make_picture(width: int = 96, height: int = 64) -> Image.Image:
    """Smooth colors under a little noise, as photographs have them."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + y / (7 + 2 * channel) + channel) for channel in range(3)]
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return Image.fromarray((128 + 90 * np.stack(waves, axis=2) + noise).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def make_png(size: tuple[int, int], depth: int, color: int, rows: list[bytes], before: bytes = b"") -> bytes:
    """A PNG written chunk by chunk, for what Pillow does not write.

    Args:
        size: (width, height) that the header claims.
        depth: bits per level.
        color: 0 gray, 2 RGB, 3 palette, 4 gray with alpha, 6 RGB with alpha.
        rows: packed levels.
        before: chunks between the header and the pixels.
    """
    header = struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def with_exif(orientation: int, image: Image.Image | None = None, format: str = "JPEG", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image or make_picture(), format, exif=exif, **options)


def _with_broken_exif() -> bytes:
    """Rational numbers with denominator 0, and a table of tags that ends too early."""
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 40)
    for tag in (0x011A, 0x011B, 0x829A):
        exif += struct.pack(">HHII", tag, 5, 1, 50)
    jpeg = encode(make_picture(), "JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2 + 8) + exif + struct.pack(">II", 1, 0) + jpeg[2:]


def _with_noise_at(data: bytes, start: int, length: int) -> bytes:
    noise = np.random.default_rng(1).integers(0, 255, length, dtype=np.uint8).tobytes()
    return data[:start] + noise + data[start + length :]


def _with_wrong_crc(png: bytes) -> bytes:
    """In the header: its size cannot be trusted."""
    return png[:29] + bytes([png[29] ^ 1]) + png[30:]


def make_damage() -> dict[str, tuple[bytes, Reason | None]]:
    """name -> (file, why it cannot be used)."""
    picture = make_picture()
    jpeg, png, webp = encode(picture, "JPEG"), encode(picture, "PNG"), encode(picture, "WEBP")
    frames = [make_picture(), make_picture().transpose(Image.Transpose.ROTATE_180)]
    text_bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000), 1))
    return {
        "sound JPEG": (jpeg, None),
        "sound PNG": (png, None),
        "sound WebP": (webp, None),
        "empty": (b"", "damaged"),
        "HTML": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "damaged"),
        "truncated JPEG": (jpeg[: len(jpeg) // 2], "damaged"),
        "truncated PNG": (png[: len(png) // 2], "damaged"),
        "truncated WebP": (webp[: len(webp) // 2], "damaged"),
        "header alone": (jpeg[: jpeg.index(b"\xff\xda")], "damaged"),
        "GIF": (encode(picture, "GIF"), "damaged"),
        "TIFF": (encode(picture, "TIFF"), "damaged"),
        "EPS": (encode(picture, "EPS"), "damaged"),
        "text bomb": (make_png((96, 64), 8, 2, [bytes(96 * 3)] * 64, text_bomb), "damaged"),
        "size bomb": (make_png((20_000, 20_000), 8, 2, [bytes(3)]), "too_large"),
        "size under Pillow's limit": (make_png((10_000, 10_000), 8, 2, [bytes(3)]), "too_large"),
        "wrong CRC": (_with_wrong_crc(png), "damaged"),
        "noise in PNG": (_with_noise_at(png, len(png) // 2, 64), "damaged"),
        # Huffman codes find their way back after a disturbance: libjpeg draws on, and Pillow does not tell.
        "noise in JPEG": (_with_noise_at(jpeg, len(jpeg) * 3 // 4, 8), None),
        "noise for Huffman tables": (_with_noise_at(jpeg, jpeg.index(b"\xff\xc4") + 5, 16), "damaged"),
        "broken EXIF": (_with_broken_exif(), None),
        "1 x 1": (encode(make_picture(1, 1), "PNG"), "too_small"),
        "1 x 3000": (encode(make_picture(1, 3000), "PNG"), "too_small"),
        "20 x 3000": (encode(make_picture(20, 3000), "JPEG"), "too_long"),
        "animated PNG": (encode(frames[0], "PNG", save_all=True, append_images=frames[1:]), "animated"),
        "animated WebP": (encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "animated"),
        "photograph with a second one behind": (
            encode(frames[0], "MPO", save_all=True, append_images=frames[1:]),
            None,
        ),
    }
