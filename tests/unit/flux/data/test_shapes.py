"""Pictures, captions and the division into training and held-out scenes."""

import numpy as np
import pytest
from PIL import Image

from flux.data.shape_score import can_score, read_scene, score_pictures
from flux.data.shapes import HELD_OUT_SCENES, SCENES, TRAIN_SCENES, Scene, ShapesSource, render


def test_held_out_scenes_are_never_trained_on():
    assert not set(TRAIN_SCENES) & set(HELD_OUT_SCENES)
    assert set(TRAIN_SCENES) | set(HELD_OUT_SCENES) == set(SCENES)
    source = ShapesSource("train", 32)
    held_out = {scene.caption for scene in HELD_OUT_SCENES}
    assert not held_out & {source[index].captions[0] for index in range(2000)}


def test_captions_name_scenes_one_to_one():
    assert len({scene.caption for scene in SCENES}) == len(SCENES)
    assert Scene("red", "circle", "", "in the center", "blue").caption == "a red circle on a blue background"
    assert (
        Scene("orange", "star", "large", "at the top left", "orange").caption
        == "a large orange star at the top left on an orange background"
    )


def test_an_index_is_always_the_same_picture():
    source = ShapesSource("train", 48)
    assert source[12].image.tobytes() == ShapesSource("train", 48)[12].image.tobytes()
    assert source[12].image.tobytes() != source[13].image.tobytes()
    assert source[12].image.size == (48, 48) and source[12].image.mode == "RGB"


def test_validation_holds_each_held_out_scene_once():
    source = ShapesSource("validation", 32)
    assert [source[index].captions[0] for index in range(len(source))] == [scene.caption for scene in HELD_OUT_SCENES]


@pytest.mark.parametrize("img_size", [64, 96])
def test_pixels_read_back_as_their_scene(img_size):
    source = ShapesSource("validation", img_size)
    samples = [source[index] for index in range(60)]
    scores = score_pictures([sample.image for sample in samples], [sample.captions[0] for sample in samples])
    assert set(scores.values()) == {1.0}, scores


def test_wrong_pictures_score_badly():
    source = ShapesSource("validation", 64)
    samples = [source[index] for index in range(60)]
    shifted = samples[1:] + samples[:1]
    scores = score_pictures([sample.image for sample in shifted], [sample.captions[0] for sample in samples])
    assert max(scores["background_color_accuracy"], scores["shape_color_accuracy"]) < 0.4, scores


def test_noise_does_not_pass_for_a_scene():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(30)]
    scores = score_pictures(noise, [scene.caption for scene in HELD_OUT_SCENES[:30]])
    assert max(scores["background_color_accuracy"], scores["shape_color_accuracy"]) < 0.5, scores


def test_a_blank_picture_shows_nothing_but_its_background():
    blank = Image.new("RGB", (64, 64), (214, 40, 40))
    captions = [scene.caption for scene in HELD_OUT_SCENES[:40]]
    scores = score_pictures([blank] * 40, captions)
    assert [scores[f"{name}_accuracy"] for name in ("shape_color", "shape", "place")] == [0, 0, 0]
    assert scores["background_color_accuracy"] == sum(" on a red background" in caption for caption in captions) / 40


def test_each_property_is_measured_on_its_own():
    scene = Scene("red", "circle", "large", "at the left", "blue")
    wrong = Scene("red", "square", "large", "at the left", "green")
    assert read_scene(render(scene, 64)) == scene
    scores = score_pictures([render(wrong, 64)], [scene.caption])
    assert scores["background_color_accuracy"] == 0 and scores["shape_accuracy"] == 0
    assert scores["shape_color_accuracy"] == scores["place_accuracy"] == scores["size_accuracy"] == 1


def test_only_own_captions_can_be_scored():
    assert can_score([scene.caption for scene in SCENES[:3]])
    assert not can_score([SCENES[0].caption, "a photograph of a cat"])
