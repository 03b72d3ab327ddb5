"""Names and folders of the text encoders."""

import subprocess
import sys

import pytest

from flux import text_folders
from flux.text_folders import CLIP_NAME, T5_NAME, TextFolders, resolve_clip, resolve_t5


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    monkeypatch.setattr(text_folders, "DOWNLOADS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("repository", ["FLUX.1-schnell", "FLUX.1-dev"])
def test_the_known_t5_is_the_one_of_a_flux_repository(downloads, repository):
    folders = TextFolders(downloads / repository / "text_encoder_2", downloads / repository / "tokenizer_2")
    for folder in folders:
        folder.mkdir(parents=True)
    assert resolve_t5(T5_NAME) == folders


def test_the_known_clip_lies_in_one_folder(downloads):
    folder = downloads / "clip-vit-large-patch14"
    folder.mkdir()
    assert resolve_clip(CLIP_NAME) == TextFolders(folder, folder)


@pytest.mark.parametrize(
    ("resolve", "name", "key", "asset"),
    [(resolve_t5, T5_NAME, "t5_encoder", "t5"), (resolve_clip, CLIP_NAME, "clip_encoder", "clip")],
)
def test_a_known_name_that_is_not_downloaded_says_the_command(downloads, resolve, name, key, asset):
    with pytest.raises(ValueError) as error:
        resolve(name)
    assert f"encoder.{key}={name!r}" in str(error.value)
    assert f"python -m scripts.download_assets --assets {asset}`" in str(error.value)


def test_a_half_downloaded_t5_says_what_is_missing(downloads):
    (downloads / "FLUX.1-schnell" / "text_encoder_2").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"there is no .*tokenizer_2: run"):
        resolve_t5(T5_NAME)


@pytest.mark.parametrize(("resolve", "key"), [(resolve_t5, "t5_encoder"), (resolve_clip, "clip_encoder")])
@pytest.mark.parametrize("name", ["no/such/folder", "google/t5-v1_1-small"])
def test_an_unknown_name_says_what_is_known(resolve, key, name):
    with pytest.raises(ValueError, match=rf"encoder\.{key}='{name}' must be a folder .* or the known name"):
        resolve(name)


@pytest.mark.parametrize(
    ("resolve", "weights", "tokenizer", "file"),
    [
        (resolve_t5, "text_encoder_2", "tokenizer_2", "spiece.model"),
        (resolve_clip, "text_encoder", "tokenizer", "tokenizer.json"),
    ],
)
def test_the_tokenizer_lies_in_the_folder_or_beside_it(tmp_path, resolve, weights, tokenizer, file):
    (tmp_path / weights).mkdir()
    (tmp_path / tokenizer).mkdir()
    name = str(tmp_path / weights)
    assert resolve(name) == TextFolders(tmp_path / weights, tmp_path / tokenizer)
    (tmp_path / weights / file).touch()
    assert resolve(name) == TextFolders(tmp_path / weights, tmp_path / weights)


def test_the_defaults_of_the_configuration_exist():
    from flux.config import Encoder

    for folders in (resolve_t5(Encoder().t5_encoder), resolve_clip(Encoder().clip_encoder)):
        assert (folders.weights / "model.safetensors").is_file() and (folders.tokenizer / "tokenizer.json").is_file()


def test_is_free_of_torch():
    check = "import sys, flux.text_folders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
