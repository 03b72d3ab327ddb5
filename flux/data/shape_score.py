"""Reads color, shape, size and place back from the pixels of drawn shapes and compares them with the captions."""

import itertools
from functools import lru_cache

import numpy as np
from PIL import Image

from flux.data.shapes import COLORS, JITTER, PLACES, SCENES, SHAPES, SIZES, Scene, render

SMALLEST = 0.01  # share of the picture below which there is no shape; the smallest that is drawn takes twice that
FRAME = 16  # the background is read from a frame one 16th of the picture wide, which no centered shape reaches

SCENE_OF_CAPTION = {scene.caption: scene for scene in SCENES}


def read_scene(image: Image.Image) -> Scene:
    """What a picture shows, measured from its pixels.

    Every pixel counts for the palette color nearest to it. The background is the commonest color of the frame, the
    shape's color the commonest other one; shape, size and place are those whose rendering overlaps best with it.
    """
    names = list(COLORS)
    palette = np.array([COLORS[name] for name in names], dtype=np.float64)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    nearest = np.square(pixels[:, :, None] - palette).sum(-1).argmin(-1)
    width = max(1, image.width // FRAME)
    frame = np.ones(nearest.shape, dtype=bool)
    frame[width:-width, width:-width] = False
    background = int(np.bincount(nearest[frame], minlength=len(names)).argmax())
    counts = np.bincount(nearest.ravel(), minlength=len(names))
    counts[background] = 0
    if counts.max() < SMALLEST * nearest.size:
        return Scene("", "", "", "", names[background])  # nothing is there
    color = int(counts.argmax())
    shape, size, place = _best_overlap(nearest == color)
    return Scene(names[color], shape, size, place, names[background])


def _best_overlap(mask: np.ndarray) -> tuple[str, str, str]:
    """The (shape, size, place) whose mask has the largest intersection over union with this one."""
    names, masks = _candidates(mask.shape[0])
    both = masks @ mask.ravel().astype(np.float32)
    either = masks.sum(1) + mask.sum() - both
    return names[int((both / np.maximum(either, 1)).argmax())]


@lru_cache(maxsize=1)
def _candidates(img_size: int) -> tuple[list[tuple[str, str, str]], np.ndarray]:
    """Every (shape, size, place), once for each of nine shifts within the jitter, and its mask as a row of 0 and 1."""
    names, masks = [], []
    for shape, size, place in itertools.product(SHAPES, SIZES, PLACES):
        for x, y in itertools.product((-JITTER, 0.0, JITTER), repeat=2):
            picture = render(Scene("white", shape, size, place, "black"), img_size, (x, y))
            names.append((shape, size, place))
            masks.append((np.asarray(picture.convert("L")) > 127).ravel())
    return names, np.stack(masks).astype(np.float32)


def can_score(captions: list[str]) -> bool:
    """Whether all captions are the shapes data set's own."""
    return all(caption in SCENE_OF_CAPTION for caption in captions)


def score_pictures(images: list[Image.Image], captions: list[str]) -> dict[str, float]:
    """Share of pictures that show what their caption says, by property, in 0..1.

    Args:
        images: drawn pictures.
        captions: one per picture, such that `can_score`.

    Returns:
        background_color_accuracy, shape_color_accuracy, shape_accuracy, size_accuracy, place_accuracy.
    """
    pairs = [(read_scene(image), SCENE_OF_CAPTION[caption]) for image, caption in zip(images, captions, strict=True)]
    properties = {"background_color": 4, "shape_color": 0, "shape": 1, "size": 2, "place": 3}
    return {
        f"{name}_accuracy": sum(seen[index] == wanted[index] for seen, wanted in pairs) / len(pairs)
        for name, index in properties.items()
    }


def describe_scores(scores: dict[str, float]) -> str:
    """For people: `background color 100%, shape 97%`."""
    names = (name.removesuffix("_accuracy").replace("_", " ") for name in scores)
    return ", ".join(f"{name} {share:.0%}" for name, share in zip(names, scores.values(), strict=True))
