"""Whole runs: no other machine is asked for, no secret is written down, no file is open to everybody."""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from tests.integration.short_runs import TINY
from tests.integration.watched_runs import HEAD
from tests.unit.flux.data.faulty_server import serve
from tests.unit.test_house import ROOT

pytestmark = pytest.mark.slow

PASSWORD, SIGNATURE = "p4ssw0rd-in-a-url", "5ignature-of-a-url"
# What libraries start to look at this machine: matplotlib asks for fonts, wandb for the processor and for git.
PROGRAMS = {"wandb-core", "fc-list", "uname", "git"}
ENVIRONMENT = {
    "HF_TOKEN": "hf_" + "aB3" * 12,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/planted",
    "AWS_SESSION_TOKEN": "planted/session/token",
    "SOME_SERVICE_PASSWORD": "planted-password",
}
PLANTED = [*ENVIRONMENT.values(), PASSWORD, SIGNATURE]
QUERY = f"X-Amz-Signature={SIGNATURE}&X-Amz-Expires=60"
SHORT = [*TINY, "--training.steps=2", "--validation.enable=false", "--training.dataloader.num_workers=1"]


class Watched(NamedTuple):
    """What became of runs in a watched process."""

    codes: list[int]
    folder: Path  # of everything that they wrote
    said: list[str]  # of each
    events: list[tuple[str, str, int]]  # of the report
    asked: int  # how often a program that was started turned to the proxy


class Listener:
    """Stands for the way out: counts who comes, and answers nobody."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        self.count = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.count += 1
            connection.close()


def make_environment(home: Path, proxy: str, wandb_mode: str) -> dict[str, str]:
    """Of a program that can only get out through a proxy, and has secrets."""
    home.mkdir()
    return {
        **{name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy),
        **{"HOME": str(home), "TMPDIR": str(home), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"},
        **{"WANDB_MODE": wandb_mode, "WANDB_BASE_URL": "http://wandb.example.org"},
        **ENVIRONMENT,
    }


def start(folder: Path, runs: list[list[str]]) -> Watched:
    listener = Listener()
    environment = make_environment(folder / "home", listener.url, "offline")
    words = [sys.executable, "-m", "tests.integration.watched_runs", str(folder / "report"), json.dumps(runs)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    listener.server.close()
    assert done.returncode == 0, done.stderr
    report = folder / "report"
    events = [tuple(json.loads(line)) for line in report.read_text().splitlines()]
    report.unlink()
    *said, codes = done.stdout.splitlines()
    assert said == []
    return Watched(json.loads(codes), folder, done.stderr.split(HEAD)[1:], events, listener.count)


def pack(numbers: range) -> bytes:
    """A tar of pictures, the last of which is damaged."""
    file, picture = io.BytesIO(), io.BytesIO()
    Image.effect_mandelbrot((40, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(picture, "PNG")
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in numbers:
            image = picture.getvalue() if number + 1 < numbers.stop else b"no picture"
            for name, content in ((f"{number}.png", image), (f"{number}.txt", f"number {number}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Watched:
    """Runs on local data, with everything that a run can write."""
    folder = tmp_path_factory.mktemp("local")
    pictures = tmp_path_factory.mktemp("pictures")
    with tarfile.open(fileobj=io.BytesIO(pack(range(10)))) as tar:
        for member in tar:
            (pictures / member.name).write_bytes(tar.extractfile(member).read())
    shapes = [*TINY, "--training.steps=2", "--training.dataloader.num_workers=1", "--checkpoint.enable"]
    shapes += ["--metrics.enable_tensorboard", "--metrics.enable_wandb", "--metrics.enable_mllog", "--ema.enable"]
    images = [*SHORT, "--training.dataset=imagefolder", f"--training.dataset_path={pictures}"]
    runs = {"shapes": shapes, "images": images}
    return start(folder, [[*options, f"--job.dump_folder={folder / name}"] for name, options in runs.items()])


@pytest.fixture(scope="module")
def remote(tmp_path_factory) -> Watched:
    """Runs on data behind a password and a signature: one that ends well, and three that do not."""
    folder = tmp_path_factory.mktemp("remote")
    with serve() as server:
        server.files[f"a.tar?{QUERY}"] = pack(range(10))
        server.faults += ["500"]

        def options(name: str, file: str = "a") -> list[str]:
            url = f"{server.url(file)}.tar?{QUERY}".replace("://", f"://reader:{PASSWORD}@")
            places = [f"--job.dump_folder={folder / name}", f"--data.index_folder={folder / 'index' / name}"]
            cache = [f"--data.shard_cache={folder / 'shards'}", "--data.shard_cache_gb=0.1"]
            return [*SHORT, *places, *cache, "--training.dataset=webdataset", f"--training.dataset_path={url}"]

        told = ["--checkpoint.enable", "--job.print_config", "--metrics.enable_wandb"]
        runs = [[*options("good"), *told], options("lost", "lost"), ["raise", *options("raised")]]
        again = f"--job.config_file={folder / 'good' / 'config.toml'}"
        runs += [[again, f"--job.dump_folder={folder / 'again'}"], ["bare", *options("bare"), *told]]
        return start(folder, runs)


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def leaks(folder: Path) -> set[tuple[str, str]]:
    """(file, secret) of what is written down in a folder, in names too."""
    contents = {path: path.name.encode() + path.read_bytes() for path in files_of(folder)}
    return {(path.name, secret) for path, text in contents.items() for secret in PLANTED if secret.encode() in text}


def test_local_data_is_trained_on_without_asking_another_machine(local):
    assert local.codes == [0, 0]
    programs = {Path(place).name for event, place, _ in local.events if event == "subprocess.Popen"}
    assert "wandb-core" in programs <= PROGRAMS
    assert [event for event in local.events if event[0] != "subprocess.Popen"] == []
    assert local.asked == 0
    written = {path.suffix for path in files_of(local.folder / "shapes")}
    assert {".wandb", ".distcp", ".png", ".toml", ".safetensors"} <= written
    assert list((local.folder / "shapes").rglob("events.out.*"))


def test_control_a_url_is_asked_for_and_seen(tmp_path):
    """By this process, and by those that it forks."""
    url = "https://data.example.org/{0..1}.tar"
    options = [*SHORT, "--training.dataset=webdataset", f"--training.dataset_path={url}", "--data.index_workers=0"]
    places = [f"--job.dump_folder={tmp_path / 'run'}", f"--data.index_folder={tmp_path / 'index'}"]
    watched = start(tmp_path, [[*options, *places], [*options, *places, "--data.index_workers=2"]])
    assert watched.codes == [3, 3]
    assert {place for _, place, _ in watched.events} == {"data.example.org"}
    assert len({process for _, _, process in watched.events}) == 3


def test_control_what_wandb_sends_is_seen_at_the_proxy(tmp_path):
    listener = Listener()
    program = (
        "import pathlib, time; from training.sinks import start_wandb; start_wandb(pathlib.Path(), {}); time.sleep(60)"
    )
    environment = make_environment(tmp_path / "home", listener.url, "online") | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment) as process:
        deadline = time.monotonic() + 60
        while not listener.count and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    assert listener.count


def test_no_secret_of_the_environment_is_written_down(local):
    assert leaks(local.folder) == set()
    assert [secret for secret in PLANTED if secret in "".join(local.said)] == []


def test_no_secret_of_a_url_is_written_down(remote):
    good, lost, raised, again, _ = remote.codes
    assert (good, lost, raised, again) == (0, 3, 1, 2)
    for name in ("good", "lost", "raised", "again", "home", "shards", "index/good", "index/lost", "index/raised"):
        assert (remote.folder / name).is_dir() and leaks(remote.folder / name) == set(), name
    said = "".join(remote.said[:4])
    assert [secret for secret in PLANTED if secret in said] == []
    reason = json.loads((remote.folder / "raised" / "exit.json").read_text())["reason"]
    assert "://********@127.0.0.1" in reason and "with ********" in reason, "the rest is told"
    assert "Traceback" in said and "trying again" in said


def test_a_configuration_that_has_lost_a_secret_says_so(remote):
    record = json.loads((remote.folder / "again" / "exit.json").read_text())
    assert "has lost a secret, which no file of a run keeps: give the whole URL again" in record["reason"]


def test_control_what_is_not_blacked_out_is_found(remote):
    found = leaks(remote.folder / "bare") | leaks(remote.folder / "index" / "bare")
    files = {file for file, secret in found if secret == PASSWORD}
    assert {"config.toml", "train_state.json"} <= files
    assert {Path(file).suffix for file in files} >= {".safetensors", ".wandb"}
    assert PASSWORD in remote.said[4] and SIGNATURE in remote.said[4]


def test_what_a_run_writes_is_not_open_to_everybody(local, remote):
    for folder in (local.folder / "shapes", local.folder / "images", remote.folder / "good", remote.folder / "lost"):
        places = [folder, *folder.rglob("*")]
        modes = {str(path.relative_to(folder.parent)): path.stat().st_mode & 0o777 for path in places}
        assert len(modes) > 1 and {name: oct(mode) for name, mode in modes.items() if mode & 0o007} == {}
    # The group may read what is a record; the library of safetensors lets nobody but the owner.
    assert (local.folder / "shapes" / "metrics.jsonl").stat().st_mode & 0o777 == 0o640
    assert (local.folder / "shapes" / "checkpoint").stat().st_mode & 0o777 == 0o750
    assert (local.folder / "home").stat().st_mode & 0o007, "control: what the test itself made is open"
