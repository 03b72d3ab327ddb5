"""Position ids against values written out by hand."""

import torch

from flux.positions import image_ids, text_ids
from flux.spec import PositionConfig

FLUX2 = PositionConfig(axes=4, reference_stride=10, text="last_axis")
QWEN = PositionConfig(centered=True, text="after_image")


def test_flux1():
    assert image_ids(PositionConfig(), 2, 3).tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 0, 2],
        [0, 1, 0],
        [0, 1, 1],
        [0, 1, 2],
    ]
    assert text_ids(PositionConfig(), 2, 2, 3).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_flux2_has_four_axes():
    assert image_ids(FLUX2, 1, 2).tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
    assert text_ids(FLUX2, 3, 1, 2).tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]


def test_qwen_counts_from_the_middle_and_text_beyond_it():
    ids = image_ids(QWEN, 3, 4)
    assert ids[:, 1].unique().tolist() == [-2, -1, 0]
    assert ids[:, 2].unique().tolist() == [-2, -1, 0, 1]
    assert text_ids(QWEN, 2, 3, 4).tolist() == [[2, 2, 2], [3, 3, 3]]


def test_reference_images_are_told_apart_on_the_first_axis():
    assert image_ids(PositionConfig(), 1, 1, reference=1).tolist() == [[1, 0, 0]]
    assert [image_ids(FLUX2, 1, 1, reference=k)[0, 0].item() for k in (0, 1, 2)] == [0, 10, 20]


def test_integers():
    """A half-precision policy casts every floating input of a model; positions must not be one."""
    assert image_ids(QWEN, 2, 2).dtype == text_ids(QWEN, 2, 2, 2).dtype == torch.int64
