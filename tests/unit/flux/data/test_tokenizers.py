"""Prompts to token ids, with the tiny tokenizers of assets/tiny."""

import pickle
import shutil
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, T5Tokenizer

from flux.config import Encoder
from flux.data.shapes import COLORS, SCENES, SHAPES
from flux.data.tokenizers import CLIP_LENGTH, FluxTokenizer, build_tokenizer
from flux.text_folders import TINY_CLIP, TINY_T5

T5_PAD, T5_END, T5_UNKNOWN = 0, 1, 2
MOST_SHAPES_TOKENS = 16  # the end token included
PRINTABLE = "".join(map(chr, range(32, 127)))
LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer() -> FluxTokenizer:
    return FluxTokenizer(TINY_T5.tokenizer, TINY_CLIP.tokenizer, LENGTH)


@pytest.fixture(scope="module")
def long_tokenizer() -> FluxTokenizer:
    """Long enough that nothing a test says is cut off."""
    return FluxTokenizer(TINY_T5.tokenizer, TINY_CLIP.tokenizer, 512)


def test_tokens_are_int64_and_padded_to_the_maximum_length(tokenizer):
    tokens = tokenizer(["a red circle", "", "word " * 200])
    assert tokens["t5"].shape == (3, LENGTH) and tokens["clip"].shape == (3, CLIP_LENGTH)
    assert tokens["t5"].dtype == tokens["clip"].dtype == torch.int64
    assert tokens["t5"][1].tolist() == [T5_END] + [T5_PAD] * (LENGTH - 1)


def test_a_long_prompt_loses_its_tail_but_not_its_end_token(tokenizer, long_tokenizer):
    prompt = "one two three " * 100
    cut, whole = tokenizer([prompt]), long_tokenizer([prompt])
    assert cut["t5"][0, -1] == T5_END and cut["clip"][0, -1] == whole["clip"][0, -1]
    assert torch.equal(cut["t5"][0, :-1], whole["t5"][0, : LENGTH - 1])


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_lengths(length):
    ids = FluxTokenizer(TINY_T5.tokenizer, TINY_CLIP.tokenizer, length)(["a red circle"])["t5"]
    assert ids.shape == (1, length) and ids[0, -1] == T5_END


def test_no_shapes_caption_has_more_than_16_t5_tokens(long_tokenizer):
    captions = sorted({scene.caption for scene in SCENES})
    counts = (long_tokenizer(captions)["t5"] != T5_PAD).sum(dim=1)
    assert int(counts.max()) <= MOST_SHAPES_TOKENS
    # Words are single pieces, so the limit is met with room: one token a word and the end.
    assert counts.tolist() == [len(caption.split()) + 1 for caption in captions]


@pytest.mark.parametrize("word", [*COLORS, *SHAPES, "top", "bottom", "left", "right", "small", "large", "background"])
def test_words_of_shapes_captions_are_single_tokens(tokenizer, word):
    tokens = tokenizer([word])
    assert tokens["t5"][0, 1] == T5_END
    assert tokens["clip"][0, 2] == tokenizer([""])["clip"][0, 1]


@pytest.mark.parametrize("character", PRINTABLE)
def test_every_printable_character_is_known(long_tokenizer, character):
    alone, inside = long_tokenizer([character, f"a{character}b"])["t5"]
    assert T5_UNKNOWN not in alone and T5_UNKNOWN not in inside


@settings(deadline=None)
@given(st.text(alphabet=PRINTABLE, max_size=120))
def test_no_printable_prompt_gives_an_unknown_token(long_tokenizer, prompt):
    assert T5_UNKNOWN not in long_tokenizer([prompt])["t5"]


@pytest.mark.parametrize("prompt", ["<unk>", "a <pad> b", "</s>", "<|endoftext|>", "<extra_id_0>"])
def test_text_that_looks_like_a_special_token_is_not_unknown(tokenizer, prompt):
    assert T5_UNKNOWN not in tokenizer([prompt])["t5"]


def test_a_character_that_was_never_seen_is_unknown(tokenizer):
    assert T5_UNKNOWN in tokenizer(["\u4e2d"])["t5"]


@pytest.fixture(scope="module")
def library() -> dict:
    return {
        "t5": T5Tokenizer.from_pretrained(TINY_T5.tokenizer),
        "clip": CLIPTokenizer.from_pretrained(TINY_CLIP.tokenizer),
    }


@settings(deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=3))
def test_ids_are_those_of_the_library(tokenizer, library, prompts):
    prompts = [prompt.encode("utf-8", "ignore").decode() for prompt in prompts]  # lone surrogates are no text
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    tokens = tokenizer(prompts)
    for key, length in (("t5", LENGTH), ("clip", CLIP_LENGTH)):
        assert torch.equal(tokens[key], library[key](prompts, max_length=length, **options).input_ids)


def test_clip_lowers_case_and_t5_keeps_it(tokenizer):
    upper, lower = tokenizer(["A RED circle"]), tokenizer(["a red circle"])
    assert torch.equal(upper["clip"], lower["clip"]) and not torch.equal(upper["t5"], lower["t5"])


def test_either_set_of_files_makes_the_same_tokenizer(tokenizer, tmp_path):
    """The FLUX repositories hold CLIP's as vocab.json and merges.txt only; T5's has both."""
    for folder, files in (
        ("t5", ("spiece.model", "tokenizer_config.json")),
        ("clip", ("vocab.json", "merges.txt", "tokenizer_config.json")),
    ):
        (tmp_path / folder).mkdir()
        for file in files:
            shutil.copy(TINY_T5.tokenizer.parent / folder / file, tmp_path / folder)
    other = FluxTokenizer(tmp_path / "t5", tmp_path / "clip", LENGTH)
    prompts = [scene.caption for scene in SCENES[::500]] + ["It's 42 ~odd~ <things>, {really}", string.punctuation]
    for key, ids in tokenizer(prompts).items():
        assert torch.equal(ids, other(prompts)[key])
    assert other.vocabulary_sizes == tokenizer.vocabulary_sizes


def test_survives_pickling_for_loader_workers(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert all(torch.equal(ids, copy(["a red circle"])[key]) for key, ids in tokenizer(["a red circle"]).items())


def test_the_libraries_are_silent(capfd, caplog):
    FluxTokenizer(TINY_T5.tokenizer, TINY_CLIP.tokenizer, LENGTH)(["word " * 600])
    assert [record.name for record in caplog.records] == ["flux.data.tokenizers"]  # our own remark on the cut prompt
    assert capfd.readouterr().out == ""


def test_test_mode_takes_the_tiny_tokenizers_whatever_is_configured(tokenizer):
    encoder = Encoder(t5_encoder="nowhere", clip_encoder="nowhere", max_t5_encoding_len=LENGTH)
    tokens = build_tokenizer(encoder, test_mode=True)(["a red circle"])
    assert torch.equal(tokens["t5"], tokenizer(["a red circle"])["t5"])
    with pytest.raises(ValueError, match=r"encoder\.t5_encoder='nowhere'"):
        build_tokenizer(encoder, test_mode=False)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"encoder\.t5_encoder: .* must hold tokenizer\.json or spiece\.model"):
        FluxTokenizer(tmp_path, TINY_CLIP.tokenizer, LENGTH)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"encoder\.clip_encoder: .* must hold tokenizer\.json or vocab\.json and merges\.txt"
    ):
        FluxTokenizer(TINY_T5.tokenizer, tmp_path, LENGTH)


def test_a_broken_or_foreign_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("not json")
    with pytest.raises(ValueError, match=r"encoder\.t5_encoder: .* must hold a tokenizer that T5Tokenizer can read"):
        FluxTokenizer(tmp_path, TINY_CLIP.tokenizer, LENGTH)
    with pytest.raises(ValueError, match=r"encoder\.t5_encoder: .* must hold a tokenizer that T5Tokenizer can read"):
        FluxTokenizer(TINY_CLIP.tokenizer, TINY_T5.tokenizer, LENGTH)
    with pytest.raises(
        ValueError, match=r"encoder\.clip_encoder: .* must hold a tokenizer that CLIPTokenizer can read"
    ):
        FluxTokenizer(TINY_T5.tokenizer, TINY_T5.tokenizer, LENGTH)


def test_cut_prompts_are_told_once(caplog):
    tokenizer = FluxTokenizer(TINY_T5.tokenizer, TINY_CLIP.tokenizer, 6)
    tokenizer(["a red circle"])
    assert not caplog.records
    for _ in range(2):
        tokenizer(["a red circle at the top left on a blue background"])
    assert [record.message for record in caplog.records] == [
        "prompts of more than encoder.max_t5_encoding_len=6 tokens lose their tail, such as "
        "'a red circle at the top left on a blue background'"
    ]
