"""CLIP's score of pictures: the number of transformers' own model, and what a wrong folder is told."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from flux.clip_score import MEAN, PREPROCESSOR, STD, ClipScorer, load_clip_scorer
from flux.text_folders import CLIP_NAME, TINY_CLIP
from tests.unit.flux.whole_clip import TOKENIZER, save_clip

TOLERANCE = 1e-4  # of a score out of 100: fp32 sums over other batch sizes
PROMPTS = ["a red circle", "a large blue square on the left", "", "a small green triangle " * 40]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def copied(clip, tmp_path):
    return shutil.copytree(clip, tmp_path / "clip")


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 100, (len(PROMPTS), 32, 32, 3))
    colors = np.array([(155, 0, 0), (0, 155, 0), (0, 0, 155), (155, 155, 155)])
    return [Image.fromarray(picture) for picture in (noise + colors[:, None, None]).astype(np.uint8)]


def cosines(folder, images, prompts) -> torch.Tensor:
    """Of each picture with each prompt, by the library alone."""
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    pixels = [np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC)) / 255 for image in images]
    pixels = torch.tensor(np.stack([(picture - MEAN) / STD for picture in pixels]), dtype=torch.float32)
    with torch.no_grad():
        logits = model(**tokens, pixel_values=pixels.permute(0, 3, 1, 2)).logits_per_image
        return logits / model.logit_scale.exp()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_score_is_that_of_the_library(clip, images, batch_size):
    cosine = cosines(clip, images, PROMPTS)
    for order in ([0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]):
        own = torch.stack([cosine[place, prompt] for place, prompt in enumerate(order)])
        found = load_clip_scorer(str(clip), "cpu").score(images, [PROMPTS[place] for place in order], batch_size)
        assert found == pytest.approx(100 * own.clamp(min=0).mean().item(), abs=TOLERANCE)
    assert (cosine < -0.01).any() and (cosine > 0.01).any(), "both sides of the limit at 0 are seen"


def test_pictures_are_prepared_as_by_the_library(clip, images):
    processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    theirs = processors.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    scorer = load_clip_scorer(str(clip), "meta")
    for image in (images[0], images[0].resize((20, 20)), images[0].resize((24, 24))):
        wanted = torch.as_tensor(theirs(image)["pixel_values"][0])
        assert torch.allclose(scorer.make_pixels(image), wanted, atol=1e-6)
    assert scorer.make_pixels(images[0].resize((24, 48))).shape == (3, 24, 24)


def best_prompts(clip, images) -> list[str]:
    return [PROMPTS[place] for place in cosines(clip, images, PROMPTS).argmax(dim=1)]


def test_prompts_of_other_pictures_have_another_score(clip, images):
    scorer, prompts = load_clip_scorer(str(clip), "cpu"), best_prompts(clip, images)
    worst = [PROMPTS[place] for place in cosines(clip, images, PROMPTS).argmin(dim=1)]
    assert scorer.score(images, prompts, 8) > scorer.score(images, worst, 8) + 1


def test_a_long_prompt_is_cut(clip, images):
    scorer = load_clip_scorer(str(clip), "cpu")
    scores = [scorer.score(images[:1], ["a red circle " * count], 1) for count in (30, 60, 61)]
    assert scores[1] == scores[2] and scorer.tokenizer.encode(PROMPTS[3]).ids[-1] == 1113


def test_the_folder_says_how_pictures_are_normalized(clip, copied, images):
    plain, prompts = load_clip_scorer(str(clip), "cpu"), best_prompts(clip, images)
    (copied / PREPROCESSOR).write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    assert load_clip_scorer(str(copied), "cpu").score(images, prompts, 8) == plain.score(images, prompts, 8)
    (copied / PREPROCESSOR).write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.1] * 3}))
    assert load_clip_scorer(str(copied), "cpu").score(images, prompts, 8) != plain.score(images, prompts, 8)


def test_a_scorer_is_frozen_and_moves_no_generator(clip, images):
    before = torch.get_rng_state()
    scorer: ClipScorer = load_clip_scorer(str(clip), "cpu")
    scorer.score(images, PROMPTS, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert not scorer.model.training and not any(one.requires_grad for one in scorer.model.parameters())
    assert {one.dtype for one in scorer.model.parameters()} == {torch.float32}


def test_looking_without_reading(clip, copied):
    assert {one.device.type for one in load_clip_scorer(str(clip), "meta").model.parameters()} == {"meta"}
    (copied / "tokenizer.json").unlink()
    (copied / "vocab.json").unlink()
    with pytest.raises(ValueError, match=r"must hold tokenizer\.json or vocab\.json and merges.txt"):
        load_clip_scorer(str(copied), "meta")


def test_weights_of_another_format(clip, copied, images):
    tensors = load_file(clip / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    halves["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(halves, copied / "model.safetensors")
    found = load_clip_scorer(str(copied), "cpu").score(images, PROMPTS, 8)
    assert found == pytest.approx(load_clip_scorer(str(clip), "cpu").score(images, PROMPTS, 8), abs=1)


def change_config(folder, change) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def test_a_configuration_starts_no_foreign_code(clip, copied):
    plain = load_clip_scorer(str(clip), "meta").model.config
    change_config(copied, lambda values: values["vision_config"].update(_attn_implementation="some/repository"))
    change_config(copied, lambda values: values.update(attn_implementation="some/repository"))
    config = load_clip_scorer(str(copied), "meta").model.config
    for read, wanted in ((config, plain), (config.vision_config, plain.vision_config)):
        assert read._attn_implementation == wanted._attn_implementation


def drop_vision(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: one for name, one in tensors.items() if "vis" not in name}, folder / "model.safetensors")


def text_only(folder):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY_CLIP.weights / name, folder)


FAULTS = {
    "text only": (text_only, "must hold an encoder of model_type clip and its config.json says 'clip_text_model'"),
    "no vision": (drop_vision, "lack vision_model"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "must hold model.safetensors"),
    "no tokenizer": (lambda folder: [(folder / name).unlink() for name in TOKENIZER], "must hold tokenizer.json"),
    "positions": (
        lambda folder: change_config(folder, lambda values: values["text_config"].update(max_position_embeddings=64)),
        "has 64 positions and must have 77",
    ),
    "other end": (
        lambda folder: change_config(folder, lambda values: values["text_config"].update(eos_token_id=7)),
        "the tokenizer ends prompts with id 1113 and the encoder's config.json says eos_token_id 7",
    ),
    "few words": (
        lambda folder: change_config(folder, lambda values: values["text_config"].update(vocab_size=9)),
        "must have (9, 32) by config.json",
    ),
    "normalization": (
        lambda folder: (folder / PREPROCESSOR).write_text('{"image_std": [1, 0, 1]}'),
        "preprocessor_config.json must have three numbers each",
    ),
    "no normalization": (lambda folder: (folder / PREPROCESSOR).write_text("["), "must be a JSON object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_folder(copied, fault):
    spoil, said = FAULTS[fault]
    spoil(copied)
    with pytest.raises(ValueError) as error:
        load_clip_scorer(str(copied), "meta")
    message = str(error.value)
    assert message.startswith("validation.clip_score_path") and said in message and "\n" not in message


@pytest.mark.parametrize(("name", "said"), [("no/such", "correct the path"), (CLIP_NAME, "download_assets")])
def test_nothing_is_there(name, said, tmp_path, monkeypatch):
    monkeypatch.setattr("flux.text_folders.DOWNLOADS", tmp_path)
    with pytest.raises(ValueError, match=f"validation.clip_score_path={name!r} .*{said}"):
        load_clip_scorer(name, "meta")
