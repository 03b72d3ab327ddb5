"""The report of runs: what stands in it, and that a browser shows it without anything else."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
from PIL import Image

from config.parse import parse
from config.write import save_config
from scripts.report import MOST_GRIDS, find_differences, find_grids, main, name_runs, read_run, write_report

ROOT = Path(__file__).parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TINY = ["--job.config_file", str(ROOT / "train_configs" / "flux_tiny.toml")]


def make_run(folder: Path, *options: str, steps: int = 40, update: int = 8, grids: int = 2) -> Path:
    """What a run leaves behind, as far as the report reads it."""
    (folder / "img").mkdir(parents=True)
    save_config(parse([*TINY, *options])[0], folder / "config.toml")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "loss": 2 / step, "grad_norm": 1 / step, "lr": 1e-3, "samples_seen": step * update}
            parts = {"loss_max": 2.2 / step, "loss/t=0.0625": 3 / step} | ({"loss/t=0.9375": 5.0} if step == 3 else {})
            ratios = {"update_ratio/double_blocks": 1e-3, "update_ratio/single_blocks": 1e-4 * step}
            line |= parts | ratios | {"samples_per_s": 50 + step, "memory_gib": 0.5}
            file.write(json.dumps(line) + "\n")
            if step % 10 == 0:
                by_time = {f"validation_loss/t={time}": 1 / step + time for time in (0.0625, 0.5625)}
                average = {"validation_loss_ema": 0.9 / step, "clip_score": 20 + step, "clip_score_ema": 21 + step}
                file.write(json.dumps({"step": step, "validation_loss": 1 / step, **by_time, **average}) + "\n")
        file.write('{"step": 41, "lo')  # torn
    for number in range(1, grids + 1):
        Image.new("RGB", (1200, 900), (0, 200, 0)).save(folder / "img" / f"step-{number * 10:06d}.png")
    (folder / "exit.json").write_text(json.dumps({"code": 0, "reason": "done", "step": steps, "rank": 0}))
    return folder


class Page(HTMLParser):
    """The text, the tags and what they point to."""

    def __init__(self, text: str):
        super().__init__()
        self.words, self.tags, self.links = "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.words += data


def test_a_page_has_curves_pictures_and_differences(tmp_path, capsys):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", "--optimizer.lr=0.002", "--training.steps=7")]
    main([*map(str, runs), "--out", str(tmp_path / "deep" / "report.html")])
    assert "report.html: " in capsys.readouterr().out
    page = Page((tmp_path / "deep" / "report.html").read_text())
    assert page.tags.count("svg") == 10  # of those of figures that were logged
    assert page.tags.count("img") == 4 and "script" not in page.tags
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    for told in (
        "step 40 of 1,000, 320 samples",
        "step 40 of 7",
        "0.0250 (least: 0.0250 at step 40)",
        "done (code 0)",
        "CLIP score",
    ):
        assert told in page.words
    assert "optimizer.lr" in page.words and "0.002" in page.words and "model.flavor" not in page.words
    assert "step 20, 160 samples" in page.words


def test_curves_stand_at_the_samples_of_their_steps(tmp_path):
    small, large = (read_run(make_run(tmp_path / f"{size}", update=size), f"{size}") for size in (8, 64))
    steps = numpy.array([10, 40])
    assert small.samples_at(steps).tolist() == [80, 320] and large.samples_at(steps).tolist() == [640, 2560]


def test_differences_are_all_and_no_others(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "--training.dataset_path=x", "--debug.seed=5")]
    runs = [read_run(folder, folder.name) for folder in folders]
    assert find_differences(runs) == {"debug.seed": ["0", "5"], "training.dataset_path": ["not set", '"x"']}
    assert find_differences([runs[0], runs[0]]) == {}


def test_of_many_pictures_some_are_shown(tmp_path):
    run = read_run(make_run(tmp_path / "run", grids=30), "run")
    shown = [step for step, _ in find_grids(run)]
    assert len(shown) == MOST_GRIDS and shown[0] == 10 and shown[-1] == 300 and shown == sorted(set(shown))


def test_names_tell_runs_apart():
    assert name_runs([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert name_runs([Path("/x/a/run"), Path("/y/a/run"), Path("/x/b/run")]) == ["x/a/run", "y/a/run", "x/b/run"]
    with pytest.raises(ValueError, match="a run is named twice"):
        name_runs([Path("/x/a"), Path("/x/a")])


def test_what_is_written_in_a_configuration_stays_text(tmp_path):
    folder = make_run(tmp_path / "<b>run</b>", "--job.description=<script>alert(1)</script>")
    page = Page(write_report([read_run(folder, folder.name)]))
    assert "script" not in page.tags and "b" not in page.tags and "<script>alert(1)</script>" in page.words


def test_a_run_of_which_little_is_left(tmp_path):
    folder = make_run(tmp_path / "run")
    for name in ("config.toml", "exit.json"):
        (folder / name).write_text("{")
    (folder / "img" / "step-000020.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    (folder / "metrics.jsonl").write_text('{"step": 3, "loss": "nan", "grad_norm": 0.0, "samples_seen": 24}\n')
    page = Page(write_report([read_run(folder, "run")]))
    assert "not yet, or without a word" in page.words and page.tags.count("img") == 1 and page.tags.count("svg") == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "run is no folder: name the folder of a run, such as outputs/tiny"),
        (lambda folder: folder.mkdir(), "run holds no metrics.jsonl: name the folder of a run"),
        (lambda folder: (folder.mkdir(), (folder / "metrics.jsonl").touch()), "has no logged step yet"),
    ],
)
def test_what_is_no_run(tmp_path, make, said):
    make(tmp_path / "run")
    with pytest.raises(ValueError, match=re.escape(said)):
        main([str(tmp_path / "run")])


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        main([str(make_run(tmp_path / "run")), "--out", str(tmp_path / "file" / "report.html")])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_it(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(write_report([read_run(make_run(tmp_path / "run"), "run")]))
    picture = tmp_path / "seen.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2400", f"--screenshot={picture}"]
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
    pixels = numpy.asarray(Image.open(picture).convert("RGB")).astype(int)
    blue = (abs(pixels - [31, 119, 180]) < 12).all(axis=2)  # the curves' color
    green = (abs(pixels - [0, 200, 0]) < 12).all(axis=2)  # the pictures'
    assert blue.sum() > 1000, "no curves"
    assert green.sum() > 2 * 300 * 200, "no pictures"
