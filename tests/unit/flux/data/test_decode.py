"""Damage, color modes, orientation and the smaller decoding of JPEG, against references that numpy computes."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from flux.data import decode
from flux.data.decode import convert_to_rgb, decode_image, parse_color, read_size
from flux.data.errors import BadSample
from tests.unit.flux.data.damage import RULES, encode, make_damage, make_picture, make_png, png_chunk, with_exif

DAMAGE = make_damage()
SMALL = replace(RULES, min_side=1, fast_jpeg=False)
COVER = (32, 32)


def levels(data: bytes, rules=SMALL, cover=COVER) -> np.ndarray:
    image = decode_image(data, rules, cover)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def assert_close(got: np.ndarray, wanted: np.ndarray, level: float = 1) -> None:
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= level


def reason_of(data: bytes, rules=RULES) -> str | None:
    try:
        decode_image(data, rules, COVER)
    except BadSample as error:
        assert error.detail and (error.key, error.shard) == ("", "")
        return error.reason
    return None


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name):
    data, reason = DAMAGE[name]
    assert reason_of(data) == reason


@pytest.mark.parametrize("name", ["too_small", "too_long", "too_large"])
def test_limits_are_sharp(name):
    within = replace(RULES, min_side=64, max_aspect=1.5, max_megapixels=96 * 64 / 1e6)
    beyond = {
        "too_small": replace(within, min_side=65),
        "too_long": replace(within, max_aspect=1.49),
        "too_large": replace(within, max_megapixels=within.max_megapixels - 1e-6),
    }
    data = encode(make_picture(96, 64), "JPEG")
    assert reason_of(data, within) is None
    assert reason_of(data, beyond[name]) == name


def test_a_file_over_the_cap_is_not_opened(monkeypatch):
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 1000)
    data = encode(make_picture(), "PNG")
    assert reason_of(data[:1000]) == "damaged"
    assert reason_of(data[:1001]) == "too_large"


def test_size_is_checked_before_pixels_are_decoded(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    assert reason_of(encode(make_picture(), "PNG"), replace(RULES, min_side=1000)) == "too_small"
    assert reason_of(DAMAGE["animated PNG"][0]) == "animated"


BOMBS = """
import resource, sys
from pathlib import Path
from tests.unit.flux.data.damage import RULES
from flux.data.decode import decode_image
from flux.data.errors import BadSample
files = [Path(name).read_bytes() for name in sys.argv[1:]]
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, -1))
for file in files:
    try:
        decode_image(file, RULES, (32, 32))
        print("decoded")
    except BadSample as error:
        print("no memory" if isinstance(error.__cause__, MemoryError) else error.reason)
"""


def test_bombs_take_no_memory(tmp_path):
    """In a process that may use 50 MB more than it does; a picture that is allowed and needs more proves the limit."""
    files = {name: DAMAGE[name][0] for name in ("size bomb", "size under Pillow's limit", "text bomb")}
    files["large"] = make_png((5_000, 5_000), 8, 2, [bytes(3)])
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", BOMBS, *(str(tmp_path / name) for name in files)]
    root = Path(decode.__file__).parents[2]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert answer.split("\n")[:-1] == ["too_large", "too_large", "damaged", "no memory"]


def test_pictures_of_truncated_files_are_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES") as raised:
        decode_image(encode(make_picture(), "PNG"), RULES, COVER)
    assert not isinstance(raised.value, BadSample)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_bytes_raise_anything_else(data):
    """Random bytes, and sound files with a few bytes changed, cut or put in."""
    name = data.draw(
        st.sampled_from(["noise", "sound JPEG", "sound PNG", "sound WebP", "animated WebP", "broken EXIF"])
    )
    start = b"" if name == "noise" else DAMAGE[name][0]
    at = data.draw(st.integers(0, min(len(start), 400)))
    file = start[:at] + data.draw(st.binary(max_size=24)) + start[at + data.draw(st.integers(0, 24)) :]
    width, height = read_size(file)
    reason = reason_of(file, replace(SMALL, max_megapixels=1.0))
    assert reason is not None or min(width, height) > 0


def gray_of(levels_HW: np.ndarray) -> np.ndarray:
    return np.repeat(levels_HW[:, :, None], 3, axis=2)


RGB = np.asarray(make_picture(40, 24)).astype(float)
GRAY = RGB[:, :, 0]
ALPHA = np.asarray(make_picture(40, 24)).astype(float)[:, :, 1]
RED = (200, 30, 60)  # a background that no channel hides behind another


def over(color_HWC: np.ndarray, alpha_HW: np.ndarray, background=RED) -> np.ndarray:
    share = alpha_HW[:, :, None] / 255
    return color_HWC * share + np.array(background) * (1 - share)


def big_endian(levels: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in np.round(levels * 257).astype(">u2")]


def eight_bit(*channels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.squeeze(np.dstack(channels)).astype(np.uint8))


PALETTE = np.array([[255, 0, 0], [0, 128, 255], [9, 8, 7], [90, 200, 30]])
PALETTE_ALPHA = np.array([0, 255, 100, 255])
INDEX = (GRAY // 64).astype(np.uint8)
PALETTE_CHUNK = png_chunk(b"PLTE", PALETTE.astype(np.uint8).tobytes())
INDEX_ROWS = [row.tobytes() for row in INDEX]
SIZE = (40, 24)
FINE = np.round(GRAY * 257 + np.arange(40))  # 16-bit levels between the 8-bit ones

MODES = {
    "RGB": (encode(eight_bit(RGB), "PNG"), RGB),
    "RGB, 16-bit": (make_png(SIZE, 16, 2, big_endian(RGB)), RGB),
    "RGB with one color transparent": (
        make_png((2, 1), 8, 2, [bytes([1, 2, 3, 4, 5, 6])], png_chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3]))),
        np.array([[RED, (4, 5, 6)]]),
    ),
    "RGBA with colors under transparent places": (encode(eight_bit(RGB, ALPHA), "PNG"), over(RGB, ALPHA)),
    "RGBA, all transparent": (encode(eight_bit(RGB, 0 * GRAY), "PNG"), over(RGB, 0 * GRAY)),
    "RGBA, 16-bit": (make_png(SIZE, 16, 6, big_endian(np.dstack([RGB, ALPHA]))), over(RGB, ALPHA)),
    "RGBA, WebP": (encode(eight_bit(RGB, ALPHA), "WEBP", lossless=True, exact=True), over(RGB, ALPHA)),
    "gray": (encode(eight_bit(GRAY), "PNG"), gray_of(GRAY)),
    "gray, 2-bit": (make_png((4, 1), 2, 0, [bytes([0b00011011])]), gray_of(np.array([[0, 85, 170, 255]]))),
    "gray, 16-bit": (make_png(SIZE, 16, 0, [row.tobytes() for row in FINE.astype(">u2")]), gray_of(FINE / 257)),
    "gray, 16-bit with one level transparent": (
        make_png((2, 1), 16, 0, [b"\x80\x80\x80\x81"], png_chunk(b"tRNS", b"\x80\x81")),
        np.array([[(128, 128, 128), RED]]),
    ),
    "gray with alpha": (encode(eight_bit(GRAY, ALPHA), "PNG"), over(gray_of(GRAY), ALPHA)),
    "gray with alpha, 16-bit": (
        make_png(SIZE, 16, 4, big_endian(np.dstack([GRAY, ALPHA]))),
        over(gray_of(GRAY), ALPHA),
    ),
    "black and white": (
        encode(eight_bit(GRAY).point(lambda v: 255 * (v > 99), "1"), "PNG"),
        gray_of(255 * (GRAY > 99)),
    ),
    "palette": (make_png(SIZE, 8, 3, INDEX_ROWS, PALETTE_CHUNK), PALETTE[INDEX]),
    "palette with alpha": (
        make_png(SIZE, 8, 3, INDEX_ROWS, PALETTE_CHUNK + png_chunk(b"tRNS", PALETTE_ALPHA.astype(np.uint8).tobytes())),
        over(PALETTE[INDEX], PALETTE_ALPHA[INDEX]),
    ),
    "palette with one color transparent": (
        make_png(SIZE, 8, 3, INDEX_ROWS, PALETTE_CHUNK + png_chunk(b"tRNS", bytes([255, 0]))),
        over(PALETTE[INDEX], 255.0 * (INDEX != 1)),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_color_modes(mode):
    data, wanted_HWC = MODES[mode]
    assert_close(levels(data, replace(SMALL, background=RED, max_aspect=100)), wanted_HWC)


def test_sixteen_bit_gray_keeps_its_levels():
    """Pillow's own conversion makes all of them white."""
    data, _ = MODES["gray, 16-bit"]
    assert len(np.unique(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))) <= 3
    assert len(np.unique(levels(data))) > 100


@pytest.mark.parametrize(
    "image",
    [Image.fromarray(FINE.astype(np.int32)), Image.fromarray(FINE.astype(np.float32))],
    ids=["I", "F"],
)
def test_wide_gray_that_other_formats_would_give(image):
    assert_close(np.asarray(convert_to_rgb(image, RED)).astype(int), gray_of(FINE / 257))


def smooth_cmyk() -> np.ndarray:
    y, x = np.mgrid[:24, :40]
    return np.stack([2 * x, 4 * y, 60 + x + y, 80 - x], axis=2).astype(np.uint8)


def test_cmyk_and_its_inverted_form():
    """JPEG stores it coarsely: the reference is made of the levels that Pillow writes at the finest quality."""
    inks = smooth_cmyk().astype(float)
    wanted = (255 - inks[:, :, :3]) * (255 - inks[:, :, 3:]) / 255
    data = encode(Image.fromarray(smooth_cmyk(), "CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data  # Pillow writes what Adobe's programs do: inverted, and says so
    assert_close(levels(data), wanted, level=3)
    unmarked = convert_to_rgb(Image.fromarray(smooth_cmyk(), "CMYK"), RED)
    assert_close(np.asarray(unmarked).astype(int), wanted)


UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_pictures_come_upright(orientation, format):
    data = with_exif(orientation, eight_bit(RGB), format, **({"lossless": True} if format == "WEBP" else {}))
    wanted = UPRIGHT[orientation](RGB)
    assert_close(levels(data), wanted, level=0)
    assert read_size(data) == wanted.shape[1::-1]


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation):
    assert_close(levels(with_exif(orientation, eight_bit(RGB), "PNG")), RGB, level=0)


def test_broken_exif_leaves_the_picture_as_it_is_stored():
    assert np.array_equal(levels(DAMAGE["broken EXIF"][0]), levels(DAMAGE["sound JPEG"][0]))


def test_a_drawn_picture_passes_as_it_is():
    image = Image.new("RGB", (8, 8))
    assert decode_image(image, RULES, COVER) is image


@pytest.mark.parametrize(
    "size, cover, wanted",
    [
        ((512, 512), (256, 256), (256, 256)),
        ((512, 512), (257, 257), (512, 512)),
        ((512, 768), (128, 300), (256, 384)),
        ((1000, 800), (100, 100), (125, 100)),
        ((999, 801), (100, 100), (125, 101)),
        ((640, 480), (640, 480), (640, 480)),
        ((200, 100), (400, 400), (200, 100)),
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_jpeg_is_decoded_as_small_as_the_cover_allows(size, cover, wanted, orientation):
    data = with_exif(orientation, make_picture(*size))
    turned = slice(None, None, -1 if orientation == 6 else 1)
    assert decode_image(data, RULES, cover[turned]).size == wanted[turned]
    assert decode_image(data, replace(RULES, fast_jpeg=False), cover[turned]).size == size[turned]


def test_png_and_webp_are_decoded_whole():
    for format in ("PNG", "WEBP"):
        assert decode_image(encode(make_picture(), format), RULES, (8, 8)).size == (96, 64)


def test_a_smaller_decoding_shows_the_same_picture():
    """Against the mean of each 2 x 2 pixels; and not by taking every second pixel, which is off by more."""
    data = encode(make_picture(512, 384), "JPEG", quality=90)
    whole = levels(data)
    means = whole.reshape(192, 2, 256, 2, 3).mean(axis=(1, 3))
    half = levels(data, RULES, (256, 192))
    assert np.abs(half - means).mean() < 1
    assert np.abs(half - means).max() < 10
    assert np.abs(whole[::2, ::2] - means).mean() > 1.5


def test_jpeg_without_the_smaller_decoding_is_exact():
    data = encode(make_picture(), "JPEG")
    assert_close(levels(data), np.asarray(Image.open(io.BytesIO(data))).astype(int), level=0)


@pytest.mark.parametrize("name", [name for name, (_, reason) in DAMAGE.items() if reason is None])
def test_sizes_of_sound_files(name):
    assert read_size(DAMAGE[name][0]) == (96, 64)
    assert read_size(io.BytesIO(DAMAGE[name][0])) == (96, 64)


@pytest.mark.parametrize("name", ["empty", "HTML", "GIF", "EPS", "text bomb", "wrong CRC"])
def test_no_size_of_what_has_no_readable_header(name):
    assert read_size(DAMAGE[name][0]) == (0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_the_beginning_of_a_file_tells_its_size(format):
    data = with_exif(6, make_picture(400, 300), format)
    end = data.index(b"\xff\xda") + 20 if format == "JPEG" else data.index(b"IDAT") + 4
    assert read_size(data[:end]) == (300, 400)


def test_sizes_are_read_without_decoding(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    assert read_size(encode(make_picture(), "PNG")) == (96, 64)


@pytest.mark.parametrize(
    "text, color",
    [("#ffffff", (255, 255, 255)), ("#08f", (0, 136, 255)), ("Navy", (0, 0, 128)), ("rgb(1, 2, 3)", (1, 2, 3))],
)
def test_colors(text, color):
    assert parse_color(text) == color


@pytest.mark.parametrize("text", ["", "ffffff", "#ffff", "#ffffff80", "transparent", "no color", "rgb(300, 0, 0)"])
def test_what_is_no_color(text):
    with pytest.raises(ValueError, match=r"data\.background=.*must be"):
        parse_color(text)
