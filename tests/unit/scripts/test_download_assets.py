"""The download command with a hub that is played by a function."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from flux import text_folders
from flux.text_folders import CLIP_NAME, T5_NAME, resolve_clip, resolve_t5
from runtime.exit_codes import CONFIG, ERROR, INTERRUPTED, OK
from scripts import download_assets
from scripts.download_assets import ASSETS, REVISIONS, main

TOKEN = "hf_NobodyMaySeeThisOne"
SCHNELL = "black-forest-labs/FLUX.1-schnell"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
T5_INDEX = "text_encoder_2/model.safetensors.index.json"
HUB_FILES = {
    SCHNELL: [
        "ae.safetensors",
        "text_encoder_2/config.json",
        T5_INDEX,
        *(f"text_encoder_2/{shard}" for shard in SHARDS),
        "tokenizer_2/spiece.model",
        "tokenizer_2/tokenizer.json",
    ],
    CLIP_NAME: ["config.json", "model.safetensors", "pytorch_model.bin", "vocab.json", "merges.txt", "README.md"],
}


class Hub:
    """Writes the files that match, and remembers how it was called."""

    def __init__(self):
        self.calls: list[dict] = []
        self.absent: set[str] = set()
        self.error: BaseException | None = None

    def snapshot_download(self, repository: str, *, revision, local_dir, allow_patterns):
        self.calls.append(
            {"repository": repository, "revision": revision, "folder": Path(local_dir), "patterns": allow_patterns}
        )
        if self.error:
            raise self.error
        for name in HUB_FILES.get(repository, []):
            if name in self.absent or not any(Path(name).match(pattern) for pattern in allow_patterns):
                continue
            file = Path(local_dir) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(
                json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}) if name == T5_INDEX else ""
            )


@pytest.fixture
def hub(monkeypatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub = Hub()
    monkeypatch.setattr(download_assets, "snapshot_download", hub.snapshot_download)
    return hub


def http_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    """As the hub's client raises it: with the address and the login in its text."""
    response = SimpleNamespace(headers={"authorization": f"Bearer {TOKEN}"}, request=None, status_code=status)
    return kind(f"{status} Client Error for https://user:{TOKEN}@huggingface.co/x?signature={TOKEN}", response=response)


def test_everything_lands_where_the_known_names_look(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_folders, "DOWNLOADS", tmp_path)
    assert main(["--to", str(tmp_path)]) == OK
    t5, clip = resolve_t5(T5_NAME), resolve_clip(CLIP_NAME)
    assert all((t5.weights / shard).is_file() for shard in SHARDS) and (t5.tokenizer / "spiece.model").is_file()
    assert (clip.weights / "model.safetensors").is_file() and (clip.tokenizer / "merges.txt").is_file()
    autoencoder = tmp_path / "FLUX.1-schnell" / "ae.safetensors"
    assert autoencoder.is_file()
    out = capsys.readouterr().out
    for key, path in (("t5_encoder", t5.weights), ("clip_encoder", clip.weights), ("autoencoder_path", autoencoder)):
        assert f'encoder.{key} = "{path}"' in out


def test_no_pickle_is_fetched(hub, tmp_path):
    main(["--to", str(tmp_path)])
    assert not list(tmp_path.rglob("*.bin")) and list(tmp_path.rglob("*.safetensors"))
    for asset in ASSETS.values():
        assert not any(Path("text_encoder_2/pytorch_model.bin").match(pattern) for pattern in asset.patterns)
        assert not any(Path("pytorch_model.bin").match(pattern) for pattern in asset.patterns)


def test_known_repositories_are_pinned_to_a_commit(hub, tmp_path):
    main(["--to", str(tmp_path)])
    assert [(call["repository"], call["revision"]) for call in hub.calls] == [
        (SCHNELL, REVISIONS[SCHNELL]),
        (CLIP_NAME, REVISIONS[CLIP_NAME]),
        (SCHNELL, REVISIONS[SCHNELL]),
    ]
    assert all(len(revision) == 40 for revision in REVISIONS.values())


def test_repository_and_revision_are_the_users_choice(hub, tmp_path):
    main(["--to", str(tmp_path), "--repo", "some/copy", "--revision", "v1", "--assets", "autoencoder", "clip"])
    main(["--to", str(tmp_path), "--repo", "some/copy", "--assets", "autoencoder"])
    calls = [(call["repository"], call["revision"], call["folder"]) for call in hub.calls]
    assert calls[0] == ("some/copy", "v1", tmp_path / "copy")
    assert calls[-1] == ("some/copy", None, tmp_path / "copy")
    assert (CLIP_NAME, "v1", tmp_path / "clip-vit-large-patch14") not in calls  # the revision is that of --repo


def test_a_dry_run_asks_nobody(hub, tmp_path, capsys):
    assert main(["--dry-run", "--to", str(tmp_path / "new")]) == OK
    assert not hub.calls and not (tmp_path / "new").exists()
    out = capsys.readouterr().out
    assert SCHNELL in out and REVISIONS[CLIP_NAME] in out and "text_encoder_2/*.safetensors" in out and "9.5 GB" in out


FAILURES = [
    (
        http_error(GatedRepoError, 403),
        CONFIG,
        f"{SCHNELL} is gated: accept its license on https://huggingface.co/{SCHNELL}, log in with `hf auth login`",
    ),
    (http_error(RepositoryNotFoundError, 404), CONFIG, f"--repo {SCHNELL} must be a repository that you can see"),
    (http_error(RevisionNotFoundError, 404), CONFIG, f"--revision {REVISIONS[SCHNELL]} must exist"),
    (http_error(HfHubHTTPError, 401), CONFIG, "refused the login for black-forest-labs/FLUX.1-schnell (status 401)"),
    (http_error(HfHubHTTPError, 503), ERROR, "answered with status 503"),
    (LocalEntryNotFoundError(f"Got: ConnectError {TOKEN}\nsecond line"), ERROR, "cannot be reached"),
    (OfflineModeIsEnabled("offline"), ERROR, "cannot be reached"),
    (HTTPError(f"connection lost {TOKEN}"), ERROR, "cannot be reached"),
    (OSError(errno.ENOSPC, "No space left on device"), ERROR, "cannot be written (No space left on device)"),
    (KeyboardInterrupt(), INTERRUPTED, "interrupted; the same command continues"),
]


@pytest.mark.parametrize(
    ("error", "code", "text"), FAILURES, ids=[type(row[0]).__name__ + str(row[1]) for row in FAILURES]
)
def test_a_failure_is_one_line_without_the_token(hub, tmp_path, capfd, error, code, text):
    hub.error = error
    assert main(["--to", str(tmp_path), "--assets", "t5"]) == code
    out, err = capfd.readouterr()
    assert err.startswith("t5: ") and text in err and err.count("\n") == 1
    assert TOKEN not in out + err and "Traceback" not in err


def test_success_does_not_print_the_token(hub, tmp_path, capfd):
    main(["--to", str(tmp_path)])
    assert TOKEN not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "absent", ["text_encoder_2/config.json", f"text_encoder_2/{SHARDS[1]}", "tokenizer_2/spiece.model"]
)
def test_an_incomplete_download_is_noticed(hub, tmp_path, capsys, absent):
    """The hub's client returns quietly when a pattern matches nothing, and offline when anything at all is there."""
    hub.absent = {absent}
    assert main(["--to", str(tmp_path), "--assets", "t5"]) == ERROR
    assert f"must hold {absent} and does not, or the download is incomplete" in capsys.readouterr().err


def test_an_asset_that_does_not_exist_is_refused(hub, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--assets", "vae"])
    assert stop.value.code == CONFIG and "autoencoder" in capsys.readouterr().err and not hub.calls


@pytest.mark.parametrize("name", ["flux", "a b/c", "a/b/c"])
def test_a_repository_that_is_no_name_is_refused(hub, capsys, name):
    with pytest.raises(SystemExit) as stop:
        main(["--repo", name])
    assert stop.value.code == CONFIG and "must be OWNER/NAME" in capsys.readouterr().err and not hub.calls
