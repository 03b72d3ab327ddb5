"""Fetches the real text encoders and the autoencoder from the Hugging Face hub.

    python -m scripts.download_assets                          # T5-XXL, CLIP-L and the FLUX.1 autoencoder, about 12 GB
    python -m scripts.download_assets --assets autoencoder --repo black-forest-labs/FLUX.1-dev
    python -m scripts.download_assets --dry-run                # says what would be fetched, without network

Only safetensors weights and the files beside them are fetched, at pinned revisions. A login is the hub's own business:
`hf auth login` or the HF_TOKEN variable; this script never reads or prints a token. Calling it again continues.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging

from flux.text_folders import CLIP_NAME, DOWNLOADS, FLUX_REPOSITORIES, download_folder
from runtime.exit_codes import CONFIG, ERROR, INTERRUPTED, OK

HUB = "https://huggingface.co"
# The files of tomorrow are not the ones that were looked at today.
REVISIONS = {
    "black-forest-labs/FLUX.1-schnell": "741f7c3ce8b383c54771c7003378a50191e9efe9",
    "black-forest-labs/FLUX.1-dev": "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
    CLIP_NAME: "32bd64288804d66eefd0ccbe215aa642df71cc41",
}


@dataclass(frozen=True)
class Asset:
    """One thing to fetch from one repository."""

    patterns: tuple[str, ...]  # of the files in the repository
    required: tuple[str, ...]  # without these the download is of no use
    setting: str  # what to write into the configuration, with {folder}
    size: str


ASSETS = {
    "t5": Asset(
        patterns=(
            "text_encoder_2/config.json",
            "text_encoder_2/*.safetensors",
            "text_encoder_2/*.safetensors.index.json",
            "tokenizer_2/*.json",
            "tokenizer_2/spiece.model",
        ),
        required=("text_encoder_2/config.json", "tokenizer_2/spiece.model"),
        setting='encoder.t5_encoder = "{folder}/text_encoder_2"',
        size="9.5 GB",
    ),
    "clip": Asset(
        patterns=(
            "config.json",
            "model.safetensors",
            "tokenizer*.json",
            "special_tokens_map.json",
            "vocab.json",
            "merges.txt",
        ),
        required=("config.json", "model.safetensors", "vocab.json", "merges.txt"),
        setting='encoder.clip_encoder = "{folder}"',
        size="1.7 GB",
    ),
    "autoencoder": Asset(
        patterns=("ae.safetensors",),
        required=("ae.safetensors",),
        setting='encoder.autoencoder_path = "{folder}/ae.safetensors"',
        size="0.3 GB",
    ),
}


class DownloadError(Exception):
    """One line for the user, and the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def download(name: str, repository: str, revision: str | None, folder: Path) -> None:
    """Fetches one asset into a folder; what lies there already is not fetched again.

    Raises:
        DownloadError: the repository is gated or unknown, the hub cannot be reached, or files are missing afterwards.
    """
    asset = ASSETS[name]
    page = f"{HUB}/{repository}"
    # NOTE: no text of the hub's errors goes into ours, since it may quote signed addresses.
    try:
        snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=list(asset.patterns))
    except GatedRepoError:
        raise DownloadError(
            f"{repository} is gated: accept its license on {page}, log in with `hf auth login`, and run this again",
            CONFIG,
        ) from None
    except RepositoryNotFoundError:
        raise DownloadError(
            f"--repo {repository} must be a repository that you can see on {page}: correct the name, "
            "or log in with `hf auth login`",
            CONFIG,
        ) from None
    except RevisionNotFoundError:
        raise DownloadError(
            f"--revision {revision} must exist in {page}/commits: correct it or leave it out", CONFIG
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise DownloadError(
                f"the hub refused the login for {repository} (status {status}): accept the license on {page}, "
                "log in with `hf auth login`, and run this again",
                CONFIG,
            ) from None
        raise DownloadError(f"the hub answered with status {status} for {repository}: try again later", ERROR) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError):
        raise DownloadError(
            f"{HUB} cannot be reached: check the network (and HF_HUB_OFFLINE, HF_ENDPOINT), then run this again", ERROR
        ) from None
    except OSError as error:
        raise DownloadError(
            f"{folder} cannot be written ({error.strerror}): free space or choose another --to", ERROR
        ) from None
    missing = missing_files(name, folder)
    if missing:
        raise DownloadError(
            f"{repository} at {revision or 'its latest revision'} must hold {', '.join(missing)} and does not, "
            f"or the download is incomplete: run this again, or use --repo {FLUX_REPOSITORIES[0]}",
            ERROR,
        )


def missing_files(name: str, folder: Path) -> list[str]:
    """Files of an asset that are not in its folder: the required ones and the shards that an index names."""
    missing = [file for file in ASSETS[name].required if not (folder / file).is_file()]
    if name == "t5":
        weights = folder / "text_encoder_2"
        index = weights / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        missing += [f"text_encoder_2/{shard}" for shard in sorted(shards) if not (weights / shard).is_file()]
    return missing


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.download_assets",
        description="Fetches the real text encoders and the autoencoder from the Hugging Face hub.",
    )
    parser.add_argument(
        "--repo",
        default=FLUX_REPOSITORIES[0],
        help="repository of T5 and the autoencoder (%(default)s)",
        metavar="NAME",
    )
    parser.add_argument(
        "--revision",
        help="commit, tag or branch of --repo (for known repositories a pinned commit, otherwise the latest)",
    )
    parser.add_argument("--assets", nargs="+", choices=tuple(ASSETS), default=list(ASSETS), help="what to fetch (all)")
    parser.add_argument(
        "--to",
        type=Path,
        default=DOWNLOADS,
        help="folder that gets one folder per repository (assets/hf)",
        metavar="FOLDER",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, without network")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repo):
        parser.error(f"--repo {options.repo!r} must be OWNER/NAME, such as {FLUX_REPOSITORIES[0]}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    hub_logging.set_verbosity_error()  # it reports every retry; progress bars stay
    settings = []
    for name in dict.fromkeys(options.assets):
        asset = ASSETS[name]
        repository = CLIP_NAME if name == "clip" else options.repo
        revision = (options.revision if name != "clip" else None) or REVISIONS.get(repository)
        folder = download_folder(repository, options.to)
        print(
            f"{name}: {asset.size} from {repository} at {revision or 'its latest revision'} into {folder}", flush=True
        )
        if options.dry_run:
            print("".join(f"    {pattern}\n" for pattern in asset.patterns), end="")
            continue
        try:
            download(name, repository, revision, folder)
        except DownloadError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return error.code
        except KeyboardInterrupt:
            print(f"{name}: interrupted; the same command continues", file=sys.stderr)
            return INTERRUPTED
        settings.append(asset.setting.format(folder=folder))
    if settings:
        print("Done. In the configuration:", *settings, sep="\n    ")
    return OK


if __name__ == "__main__":
    sys.exit(main())
