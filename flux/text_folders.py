"""Where the text encoders and their tokenizers lie. No torch here, so that commands that only look answer at once.

A folder is in the Hugging Face layout. Weights and tokenizer share one folder, or the tokenizer lies beside the weights
as in the FLUX repositories: `text_encoder_2` with `tokenizer_2` (T5), `text_encoder` with `tokenizer` (CLIP).
"""

from pathlib import Path
from typing import NamedTuple

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DOWNLOADS = ASSETS / "hf"  # scripts.download_assets fills it
FLUX_REPOSITORIES = ("black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX.1-dev")  # the same T5 in both
T5_NAME = "google/t5-v1_1-xxl"
CLIP_NAME = "openai/clip-vit-large-patch14"

# Any one of these sets of files makes a tokenizer.
T5_TOKENIZER_FILES = (("tokenizer.json",), ("spiece.model",))
CLIP_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


class TextFolders(NamedTuple):
    """Of one text encoder."""

    weights: Path
    tokenizer: Path


TINY_T5 = TextFolders(ASSETS / "tiny" / "t5", ASSETS / "tiny" / "t5")
TINY_CLIP = TextFolders(ASSETS / "tiny" / "clip", ASSETS / "tiny" / "clip")


def download_folder(repository: str, root: Path) -> Path:
    """The folder under `root` that `scripts.download_assets` fills from a repository of the Hugging Face hub."""
    return root / repository.rpartition("/")[2]


def resolve_t5(name: str) -> TextFolders:
    """Folders of `encoder.t5_encoder`: the known name google/t5-v1_1-xxl, or a folder.

    Raises:
        ValueError: nothing is there, with the command that downloads it for the known name.
    """
    if name == T5_NAME:
        downloads = [download_folder(repository, DOWNLOADS) for repository in FLUX_REPOSITORIES]
        folder = next((folder for folder in downloads if (folder / "text_encoder_2").is_dir()), downloads[0])
        return _downloaded("encoder.t5_encoder", name, folder / "text_encoder_2", folder / "tokenizer_2", "t5")
    return _plain_folder("encoder.t5_encoder", name, T5_NAME, "tokenizer_2", T5_TOKENIZER_FILES)


def resolve_clip(name: str, key: str = "encoder.clip_encoder") -> TextFolders:
    """Folders of a configuration key: the known name openai/clip-vit-large-patch14, or a folder.

    Raises:
        ValueError: nothing is there, with the command that downloads it for the known name.
    """
    if name == CLIP_NAME:
        folder = download_folder(CLIP_NAME, DOWNLOADS)
        return _downloaded(key, name, folder, folder, "clip")
    return _plain_folder(key, name, CLIP_NAME, "tokenizer", CLIP_TOKENIZER_FILES)


def holds_any(folder: Path, alternatives: tuple[tuple[str, ...], ...]) -> bool:
    """Whether all files of one of the alternatives lie in the folder."""
    return any(all((folder / file).is_file() for file in files) for files in alternatives)


def _downloaded(key: str, name: str, weights: Path, tokenizer: Path, asset: str) -> TextFolders:
    missing = [str(folder) for folder in dict.fromkeys((weights, tokenizer)) if not folder.is_dir()]
    if missing:
        raise ValueError(
            f"{key}={name!r} is not downloaded, there is no {' and no '.join(missing)}: "
            f"run `python -m scripts.download_assets --assets {asset}`"
        )
    return TextFolders(weights, tokenizer)


def _plain_folder(
    key: str, name: str, known: str, sibling: str, tokenizer_files: tuple[tuple[str, ...], ...]
) -> TextFolders:
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        raise ValueError(
            f"{key}={name!r} must be a folder in the Hugging Face layout or the known name {known}, "
            f"and there is no folder {folder}: correct the path"
        )
    beside = folder.parent / sibling
    own = holds_any(folder, tokenizer_files) or not beside.is_dir()
    return TextFolders(folder, folder if own else beside)
