"""Procedural pictures with captions: one colored shape on a colored background.

Small enough for a laptop to learn in minutes, and every picture can be checked from its pixels. Scenes (color, shape,
size, place, background) are split once: held-out combinations never appear in training.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from flux.data.sample import Sample, Shard
from flux.rng import keyed_generator

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (246, 222, 60),
    "green": (44, 160, 70),
    "blue": (40, 84, 214),
    "purple": (132, 46, 170),
    "white": (246, 246, 246),
    "black": (20, 20, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES: dict[str, float] = {"small": 0.17, "": 0.22, "large": 0.28}  # radius as a share of the picture
PLACES: dict[str, tuple[float, float]] = {
    "in the center": (0.50, 0.50),
    "at the top": (0.50, 0.28),
    "at the bottom": (0.50, 0.72),
    "at the left": (0.28, 0.50),
    "at the right": (0.72, 0.50),
    "at the top left": (0.28, 0.28),
    "at the top right": (0.72, 0.28),
    "at the bottom left": (0.28, 0.72),
    "at the bottom right": (0.72, 0.72),
}
JITTER = 0.02  # largest shift of the center, as a share of the picture
HELD_OUT_SHARE = 10  # one scene in ten is never trained on
TRAIN_LENGTH = 1_000_000  # an epoch; scenes repeat with other jitter
SUPERSAMPLING = 4


class Scene(NamedTuple):
    color: str
    shape: str
    size: str
    place: str
    background: str

    @property
    def caption(self) -> str:
        """The one caption of the scene; the center is where things are when no place is named."""
        subject = " ".join(word for word in (self.size, self.color, self.shape) if word)
        place = "" if self.place == "in the center" else f" {self.place}"
        return f"{_with_article(subject)}{place} on {_with_article(self.background)} background"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _digest(scene: Scene) -> int:
    return int.from_bytes(hashlib.blake2b("|".join(scene).encode(), digest_size=8).digest(), "big")


SCENES = tuple(
    Scene(*combination)
    for combination in itertools.product(COLORS, SHAPES, SIZES, PLACES, COLORS)
    if combination[0] != combination[4]
)
TRAIN_SCENES = tuple(scene for scene in SCENES if _digest(scene) % HELD_OUT_SHARE)
# In digest order, so that any first few of them are a fair mix.
HELD_OUT_SCENES = tuple(sorted((scene for scene in SCENES if _digest(scene) % HELD_OUT_SHARE == 0), key=_digest))


class ShapesSource:
    """Map-style source of shape pictures; `source[index]` is always the same picture.

    Args:
        split: "train" draws TRAIN_LENGTH pictures of training scenes, "validation" holds each held-out scene once.
        img_size: side of the square pictures in pixels.
    """

    def __init__(self, split: Literal["train", "validation"], img_size: int):
        self.split = split
        self.img_size = img_size

    @property
    def shards(self) -> Sequence[Shard]:
        return (Shard("shapes", 0, len(self)),)

    def __len__(self) -> int:
        return TRAIN_LENGTH if self.split == "train" else len(HELD_OUT_SCENES)

    def __getitem__(self, index: int) -> Sample:
        scene, image = self.draw(index)
        return Sample(image, (scene.caption,), key=f"shapes/{index}")

    def draw(self, index: int) -> tuple[Scene, Image.Image]:
        """What the picture of that number shows, and the picture."""
        generator = keyed_generator(0, f"shapes/{self.split}", index)
        choice, x, y = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        scene = TRAIN_SCENES[int(choice * len(TRAIN_SCENES))] if self.split == "train" else HELD_OUT_SCENES[index]
        shift = ((2 * x - 1) * JITTER, (2 * y - 1) * JITTER)
        return scene, render(scene, self.img_size, shift)

    def picture_sizes(self) -> np.ndarray:
        return np.full((len(self), 2), self.img_size, np.int32)


def render(scene: Scene, img_size: int, shift: tuple[float, float] = (0.0, 0.0)) -> Image.Image:
    """Draws a scene, antialiased.

    Args:
        scene: what to draw.
        img_size: side in pixels.
        shift: (x, y) added to the center, as a share of the picture.
    """
    side = img_size * SUPERSAMPLING
    x, y = ((place + offset) * side for place, offset in zip(PLACES[scene.place], shift, strict=True))
    radius = SIZES[scene.size] * side
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if scene.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    elif scene.shape == "cross":
        arm = radius / 3
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=255)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=255)
    else:
        pen.polygon(_outline(scene.shape, x, y, radius), fill=255)
    picture = Image.new("RGB", (img_size, img_size), COLORS[scene.background])
    picture.paste(COLORS[scene.color], mask=mask.reduce(SUPERSAMPLING))
    return picture


def _outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a polygon; radii alternate for the star, the first corner points up except for the square."""
    corners, radii, start = {
        "square": (4, (0.9 * math.sqrt(2),), 45.0),
        "triangle": (3, (1.15,), 0.0),
        "star": (10, (1.15, 0.5), 0.0),
    }[shape]
    angles = [math.radians(start + 360.0 * corner / corners) for corner in range(corners)]
    reach = [radius * radii[corner % len(radii)] for corner in range(corners)]
    return [(x + r * math.sin(a), y - r * math.cos(a)) for a, r in zip(angles, reach, strict=True)]
