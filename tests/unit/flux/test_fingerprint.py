"""Other weights, tokenizers and settings have other fingerprints; other places and file headers have the same."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux.config import Encoder
from flux.data.cache import find_difference
from flux.fingerprint import describe_encoders
from flux.text_folders import TINY_T5

ENCODER = Encoder()


def difference(encoder: Encoder, test_mode: bool = False) -> str | None:
    return find_difference(describe_encoders(ENCODER, False), describe_encoders(encoder, test_mode))


def test_the_same_encoders_are_the_same():
    assert difference(ENCODER) is None


def test_a_copy_elsewhere_is_the_same(tmp_path):
    folder = shutil.copytree(TINY_T5.weights, tmp_path / "t5")
    assert difference(replace(ENCODER, t5_encoder=str(folder))) is None


@pytest.mark.parametrize("place", [0, -1, None])
def test_one_changed_value_of_a_small_tensor_is_seen(tmp_path, place):
    """At the beginning, at the end, in the middle: all that is read of a large one."""
    folder = shutil.copytree(TINY_T5.weights, tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    values = weights["shared.weight"].view(-1)
    values[len(values) // 2 if place is None else place] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert difference(replace(ENCODER, t5_encoder=str(folder))).startswith("t5.weights ")


def test_another_tokenizer_is_seen(tmp_path):
    folder = shutil.copytree(TINY_T5.weights, tmp_path / "t5")
    file = folder / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    assert difference(replace(ENCODER, t5_encoder=str(folder))).startswith("t5.tokenizer ")


def test_another_configuration_is_seen_and_who_wrote_it_is_not(tmp_path):
    folder = shutil.copytree(TINY_T5.weights, tmp_path / "t5")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"transformers_version": "0"}))
    assert difference(replace(ENCODER, t5_encoder=str(folder))) is None
    file.write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    assert difference(replace(ENCODER, t5_encoder=str(folder))).startswith("t5.config ")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"dtype": "float32"}, "autoencoder.dtype"),
        ({"max_t5_encoding_len": 9}, "t5.max_t5_encoding_len"),
        ({"mask_padding": True}, "t5.mask_padding"),
    ],
)
def test_how_they_are_used_counts(change, name):
    assert difference(replace(ENCODER, **change)).startswith(name)


def test_random_encoders_are_others():
    assert difference(ENCODER, test_mode=True).startswith("clip.")


def test_what_is_no_weight_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"encoder.autoencoder_path: .*no.safetensors is not a complete safetensors"):
        describe_encoders(replace(ENCODER, autoencoder_path=str(tmp_path / "no.safetensors")), False)
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="its header is longer than the file"):
        describe_encoders(replace(ENCODER, autoencoder_path=str(tmp_path / "cut.safetensors")), False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no safetensors files"):
        describe_encoders(replace(ENCODER, autoencoder_path=str(tmp_path / "empty")), False)


def test_large_tensors_are_read_in_three_places(tmp_path):
    save_file({"large": torch.arange(100_000)}, tmp_path / "a.safetensors")
    one = describe_encoders(replace(ENCODER, autoencoder_path=str(tmp_path / "a.safetensors")), False)
    save_file({"large": torch.arange(100_000) + 1}, tmp_path / "a.safetensors")
    other = describe_encoders(replace(ENCODER, autoencoder_path=str(tmp_path / "a.safetensors")), False)
    assert find_difference(one, other).startswith("autoencoder.weights ")
