"""What the committed tiny encoders must be good for, and that they come from the script."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flux.conditioner import build_conditioner
from flux.config import Encoder
from flux.data.shapes import COLORS, PLACES, SCENES, SHAPES, SIZES
from flux.data.tokenizers import FluxTokenizer, build_tokenizer
from flux.spec import SPECS
from flux.text_folders import TINY_CLIP, TINY_T5
from scripts.make_tiny_text_encoders import main, make_corpus

LENGTH = 16
MOST_BYTES = 3_000_000
MOST_ALIKE = 0.8  # cosine of two different words; the same word has 1
ROUNDING = 0.05  # of bfloat16 weights of unit size, drawn on another machine
FACTS = {"color": [*COLORS], "shape": [*SHAPES], "size": [*SIZES], "place": [*PLACES], "background": [*COLORS]}
TRAINED, TESTED = 1000, 300
RIDGE = 1e-3


@pytest.fixture(scope="module")
def scenes() -> list:
    order = torch.randperm(len(SCENES), generator=torch.Generator().manual_seed(0))
    return [SCENES[place] for place in order[: TRAINED + TESTED].tolist()]


@pytest.fixture(scope="module")
def encode():
    section = Encoder(dtype="float32", max_t5_encoding_len=LENGTH)
    tokenizer = build_tokenizer(section, test_mode=False)
    conditioner = build_conditioner(section, SPECS["flux-tiny"].transformer, test_mode=False, device="cpu")
    return lambda prompts: conditioner.encode(tokenizer(prompts))


def probe(features_BF: Tensor, scenes: list) -> dict[str, float]:
    """Share of held-out captions whose facts a linear (ridge) probe reads from the features."""
    features_BF = torch.cat([features_BF, torch.ones(len(features_BF), 1)], dim=1).double()
    train, test = features_BF[:TRAINED], features_BF[TRAINED:]
    kernel = train @ train.T
    kernel += RIDGE * kernel.diagonal().mean() * torch.eye(TRAINED, dtype=torch.float64)
    right = {}
    for fact, values in FACTS.items():
        labels_B = torch.tensor([values.index(getattr(scene, fact)) for scene in scenes])
        targets = torch.nn.functional.one_hot(labels_B[:TRAINED], len(values)).double()
        guess_B = (test @ (train.T @ torch.linalg.solve(kernel, targets))).argmax(dim=1)
        right[fact] = float((guess_B == labels_B[TRAINED:]).double().mean())
    return right


def test_the_features_tell_every_fact_of_a_caption(encode, scenes):
    """Also without the order of the tokens, which the transformer does not see: T5 has bound color to shape."""
    cond = encode([scene.caption for scene in scenes])
    assert min(probe(cond.txt_BLE.flatten(1), scenes).values()) > 0.97
    assert min(probe(cond.txt_BLE.mean(dim=1), scenes).values()) > 0.97
    assert min(probe(cond.pooled_BV, scenes).values()) > 0.9


def test_the_probe_fails_where_the_facts_are_not(scenes):
    """Negative control: embeddings without their order cannot tell the shape's color from the background's."""
    embedding = load_file(TINY_T5.weights / "model.safetensors")["shared.weight"].float()
    ids = FluxTokenizer(TINY_T5.tokenizer, TINY_CLIP.tokenizer, LENGTH)([scene.caption for scene in scenes])["t5"]
    right = probe(embedding[ids].mean(dim=1), scenes)
    assert right["shape"] > 0.97 and right["color"] < 0.7 and right["background"] < 0.7


def test_different_words_have_different_features(encode):
    words = sorted({word for scene in SCENES for word in scene.caption.split()})
    features = torch.nn.functional.normalize(encode(words).txt_BLE[:, 0], dim=1)
    alike = features @ features.T
    assert max(float(alike[a, b]) for a, b in itertools.combinations(range(len(words)), 2)) < MOST_ALIKE


def test_features_have_unit_size(encode, scenes):
    cond = encode([scene.caption for scene in scenes])
    for features in (cond.txt_BLE, cond.pooled_BV):
        assert 0.8 < float(features.square().mean().sqrt()) < 1.25


def test_the_folders_are_small_and_hold_no_pickle():
    files = [file for folders in (TINY_T5, TINY_CLIP) for file in folders.weights.iterdir()]
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    assert {file.suffix for file in files} == {".json", ".txt", ".model", ".safetensors"}


def test_the_configurations_are_those_of_the_published_kinds():
    t5 = json.loads((TINY_T5.weights / "config.json").read_text())
    clip = json.loads((TINY_CLIP.weights / "config.json").read_text())
    assert (t5["model_type"], t5["feed_forward_proj"], t5["d_model"]) == ("t5", "gated-gelu", 128)
    assert (clip["model_type"], clip["max_position_embeddings"], clip["hidden_size"]) == ("clip_text_model", 77, 128)
    assert clip["eos_token_id"] == clip["vocab_size"] - 1


def test_the_corpus_is_always_the_same():
    corpus = make_corpus()
    assert corpus == make_corpus()
    assert {scene.caption for scene in SCENES} <= set(corpus)


def test_the_committed_files_come_from_the_script(tmp_path, capsys):
    main(["--out", str(tmp_path)])
    assert "model.safetensors" in capsys.readouterr().out
    captions = sorted({scene.caption for scene in SCENES})[::50]
    made = FluxTokenizer(tmp_path / "t5", tmp_path / "clip", LENGTH)(captions)
    committed = FluxTokenizer(TINY_T5.tokenizer, TINY_CLIP.tokenizer, LENGTH)(captions)
    assert all(torch.equal(made[key], committed[key]) for key in made)
    for name, folders in (("t5", TINY_T5), ("clip", TINY_CLIP)):
        made = load_file(tmp_path / name / "model.safetensors")
        committed = load_file(folders.weights / "model.safetensors")
        assert made.keys() == committed.keys()
        assert all(float((made[key] - committed[key]).abs().max()) <= ROUNDING for key in made)
