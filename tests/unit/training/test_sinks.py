"""TensorBoard and wandb get what is logged; one that raises or hangs costs a warning and nothing else."""

import contextlib
import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from training import metrics, sinks
from training.config import Metrics
from training.metrics import METRICS_NAME, MetricsLogger
from training.sinks import WANDB_ID_NAME, SinkThread

ROOT = Path(__file__).parents[3]
HANG = 120  # seconds after which a process counts as one that does not end
BRIEF = 0.2  # seconds of a limit that is to be reached
MOMENTS = ["build", "start", "log", "close"]


@pytest.fixture
def released():
    """An event that hanging sinks wait for, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


class Recorder:
    """Remembers what it is told, and at one moment calls a function instead."""

    def __init__(self, moment="never", act=None):
        self.moment, self.act, self.told = moment, act, []
        self._tell("build")

    def start(self):
        self._tell("start")

    def log(self, step, values):
        self._tell("log", step, values)

    def log_image(self, step, name, path):
        self._tell("image", step, name, path)

    def close(self):
        self._tell("close")

    def _tell(self, moment, *figures):
        if moment == self.moment:
            self.act()
        self.told.append((moment, *figures))


def refuse():
    raise OSError("disk\nfull")


def run_in_thread(build) -> SinkThread:
    return SinkThread("metrics.enable_x", "x", "it needs x", build)


def finish(sink) -> None:
    sink.end()
    sink.wait(HANG)


def log_three(folder) -> None:
    """A logger with TensorBoard gets three steps; the lines must be there in any case."""
    logger = MetricsLogger(folder, Metrics(enable_tensorboard=True), {})
    for step in (1, 2, 3):
        logger.log(step, {"loss": 1.0})
    logger.close()
    assert [json.loads(line)["step"] for line in (folder / METRICS_NAME).read_text().splitlines()] == [1, 2, 3]


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_tensorboard_shows_the_steps_of_a_run_that_went_on_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    section = Metrics(enable_tensorboard=True)
    for done, losses in ((0, {1: 0.9, 2: 0.8, 3: 0.7}), (2, {3: 0.5})):
        logger = MetricsLogger(tmp_path, section, {}, done)
        for step, loss in losses.items():
            logger.log(step, {"loss": loss})
        logger.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    shown = [(event.step, round(event.value, 4)) for event in events.Scalars("loss")]
    assert shown == [(1, 0.9), (2, 0.8), (3, 0.5)]


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (4, 4), "red").save(tmp_path / "grid.png")
    logger = MetricsLogger(tmp_path, Metrics(enable_tensorboard=True, save_tb_folder="events"), {})
    logger.log(3, {"loss": 0.5})
    logger.log_image(3, "samples", tmp_path / "grid.png")
    logger.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    assert [(event.step, event.width) for event in events.Images("samples")] == [(3, 4)]


def run_wandb_offline(folder, done, loss):
    """A leg of a run with one logged step and a picture; what it wrote, by path."""
    body = f"""
from pathlib import Path
from training import metrics
from training.config import Metrics
from training.metrics import MetricsLogger
metrics.CLOSE_SECONDS = {HANG}
folder = Path({str(folder)!r})
logger = MetricsLogger(folder, Metrics(enable_wandb=True), {{"training": {{"steps": 54321}}}}, {done})
logger.log({done} + 1, {{"loss": {loss}}})
logger.log_image({done} + 1, "samples", folder / "grid.png")
logger.close()
"""
    command = [sys.executable, "-c", body, "--secret", "planted-secret"]
    environment = {"PATH": "", "HOME": str(folder), "WANDB_MODE": "offline"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "off" not in done.stderr
    return {path: path.read_bytes() for path in (folder / "wandb").rglob("*") if path.is_file()}


def test_wandb_offline_keeps_the_command_line_to_itself_and_goes_on_as_one_run(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "grid.png")
    files = run_wandb_offline(tmp_path, done=0, loss=0.5)
    assert any(path.suffix == ".wandb" and b"54321" in content for path, content in files.items())
    assert any(path.suffix == ".png" for path in files)
    assert not any(b"planted-secret" in content for content in files.values())

    identity = (tmp_path / WANDB_ID_NAME).read_text().strip()
    both = run_wandb_offline(tmp_path, done=1, loss=0.25)
    assert (tmp_path / WANDB_ID_NAME).read_text().strip() == identity
    legs = {path.name for path in both if path.suffix == ".wandb"}
    assert legs == {f"run-{identity}.wandb"} and len([path for path in both if path.suffix == ".wandb"]) == 2


def test_everything_arrives_in_order_and_before_close_returns(tmp_path, monkeypatch, caplog):
    recorder = Recorder()
    monkeypatch.setattr(sinks, "_TensorBoard", lambda *_: recorder)
    logger = MetricsLogger(tmp_path, Metrics(enable_tensorboard=True), {})
    values = {"loss": 1.0}
    logger.log(1, values)
    values["loss"] = 9.0  # the caller's own again
    logger.log_image(1, "samples", tmp_path / "grid.png")
    logger.log(2, {"loss": 0.5})
    logger.close()
    logger.close()
    image = ("image", 1, "samples", tmp_path / "grid.png")
    figures = [("log", 1, {"loss": 1.0}), image, ("log", 2, {"loss": 0.5})]
    assert recorder.told == [("build",), ("start",), *figures, ("close",)]
    assert not told(caplog)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_sink_that_raises_is_off_with_one_line(tmp_path, monkeypatch, caplog, moment):
    monkeypatch.setattr(sinks, "_TensorBoard", lambda *_: Recorder(moment, refuse))
    log_three(tmp_path)
    line = "metrics.enable_tensorboard=true is off from here on: OSError: disk full"
    needs = ": it needs tensorboard installed, and a metrics.save_tb_folder that can be written"
    assert told(caplog) == [line + (needs if moment in ("build", "start") else "")]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_sink_that_hangs_is_given_up_with_one_line(tmp_path, monkeypatch, caplog, released, moment):
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", BRIEF)
    monkeypatch.setattr(sinks, "_TensorBoard", lambda *_: Recorder(moment, released.wait))
    log_three(tmp_path)
    (line,) = told(caplog)
    assert "metrics.enable_tensorboard=true is off" in line and "has not finished in time" in line


def test_one_that_hangs_takes_no_time_from_the_other(tmp_path, monkeypatch, caplog, released):
    whole = Recorder()
    monkeypatch.setattr(metrics, "HASTY_CLOSE_SECONDS", 5 * BRIEF)
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", 2 * HANG)
    monkeypatch.setattr(sinks, "_TensorBoard", lambda *_: whole)
    monkeypatch.setattr(sinks, "_Wandb", lambda *_: Recorder("close", released.wait))
    logger = MetricsLogger(tmp_path, Metrics(enable_tensorboard=True, enable_wandb=True), {})
    closing = threading.Thread(target=logger.close, kwargs={"in_haste": True}, daemon=True)
    closing.start()
    closing.join(HANG)
    assert not closing.is_alive()
    (line,) = told(caplog)
    assert line.startswith("metrics.enable_wandb=true is off") and whole.told[-1] == ("close",)


def test_a_sink_that_starts_too_late_gets_nothing_and_is_closed(monkeypatch, caplog, released):
    monkeypatch.setattr(sinks, "START_SECONDS", 0.0)
    built = []

    def build():
        released.wait()
        built.append(Recorder())
        return built[0]

    sink = run_in_thread(build)
    for _ in range(3):
        sink.put(lambda place: place.log(1, {}))
    assert told(caplog) == ["metrics.enable_x=true is off from here on: it has not started within 0 s: it needs x"]
    released.set()
    sink._thread.join(HANG)
    assert built[0].told == [("build",), ("start",), ("close",)]
    finish(sink)
    assert len(told(caplog)) == 1


def test_a_full_queue_leaves_entries_out_and_says_so_once(monkeypatch, caplog, released):
    monkeypatch.setattr(sinks, "QUEUED", 2)
    hangs = threading.Event()
    recorder = Recorder("log", lambda: (hangs.set(), released.wait()))
    sink = run_in_thread(lambda: recorder)
    sink.put(lambda place: place.log(1, {}))
    assert hangs.wait(HANG)
    for step in (2, 3, 4, 5):
        sink.put(lambda place, step=step: place.log(step, {}))
    assert told(caplog) == ["metrics.enable_x=true: 2 entries wait, and the next ones are left out"]
    released.set()
    finish(sink)
    assert [entry[1] for entry in recorder.told if entry[0] == "log"] == [1, 2, 3]
    assert recorder.told[-1] == ("close",) and len(told(caplog)) == 1


def test_a_run_starts_when_sinks_are_built_and_waits_for_no_server(tmp_path, monkeypatch, released):
    built = threading.Event()

    def build(*_):
        built.wait()
        return Recorder("start", released.wait)

    monkeypatch.setattr(sinks, "_TensorBoard", build)
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", BRIEF)
    logger = MetricsLogger(tmp_path, Metrics(enable_tensorboard=True), {})
    monkeypatch.setattr(sinks, "BUILD_SECONDS", BRIEF)
    logger.start_run(0)  # nor for one whose import hangs
    monkeypatch.setattr(sinks, "BUILD_SECONDS", 2 * HANG)
    starting = threading.Thread(target=logger.start_run, args=(0,), daemon=True)
    starting.start()
    starting.join(BRIEF)
    assert starting.is_alive()
    built.set()
    starting.join(HANG)
    assert not starting.is_alive()
    logger.close()


@pytest.mark.parametrize("kind", ["_TensorBoard", "_Wandb"])
def test_no_program_is_started_once_a_sink_is_built(tmp_path, kind):
    """A worker that is forked in that moment would inherit its pipe, and the sink would wait for the worker's end."""
    body = f"""
import sys
from pathlib import Path
from training import sinks
watched = False
def refuse(event, arguments):
    if watched and event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        raise AssertionError(f"{{event}} {{arguments}}")
sys.addaudithook(refuse)
sink = sinks.{kind}(Path({str(tmp_path)!r}), {{}} if {kind!r} == "_Wandb" else 0)
watched = True
sink.start()
sink.log(1, {{"loss": 1.0}})
sink.close()
"""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    subprocess.run([sys.executable, "-c", body], cwd=ROOT, env=environment, check=True, timeout=HANG)


def test_wandb_that_is_not_installed_is_told_with_what_to_do(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = MetricsLogger(tmp_path, Metrics(enable_wandb=True), {})
    logger.log(1, {"loss": 1.0})
    logger.close()
    (line,) = told(caplog)
    assert line.startswith("metrics.enable_wandb=true is off from here on: ModuleNotFoundError: ")
    assert line.endswith(": it needs wandb installed, and one of WANDB_MODE=offline, `wandb login` and WANDB_API_KEY")


USES_WANDB = """
import logging, sys
from pathlib import Path
from training import metrics
from training.config import Metrics
from training.metrics import MetricsLogger
logging.basicConfig(format="%(message)s")
metrics.CLOSE_SECONDS = float(sys.argv[2])
logger = MetricsLogger(Path(sys.argv[1]), Metrics(enable_wandb=True), {})
logger.start_run(0)
logger.log(1, {"loss": 1.0})
logger.close()
"""


def run_on_a_terminal(folder, environment, limit=HANG) -> str:
    """What a process that logs to wandb says to the person at its terminal, who does not answer."""
    ours, its = pty.openpty()
    command = [sys.executable, "-c", USES_WANDB, str(folder), str(limit)]
    environment = {"PATH": "", "HOME": str(folder), "PYTHONPATH": str(ROOT), "TERM": "xterm", **environment}
    process = subprocess.Popen(command, env=environment, stdin=its, stdout=its, stderr=its, cwd=folder)
    os.close(its)
    try:
        assert process.wait(HANG) == 0
    finally:
        process.kill()
    said = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while more := os.read(ours, 4096):
            said += more
    os.close(ours)
    return said.decode()


@pytest.mark.parametrize(("key", "why"), [(None, "No API key"), ("planted-secret", "must have 40+ characters")])
def test_wandb_never_asks_for_a_key_and_never_shows_it(tmp_path, key, why):
    said = run_on_a_terminal(tmp_path, {} if key is None else {"WANDB_API_KEY": key})
    (line,) = said.strip().splitlines()
    assert line.startswith("metrics.enable_wandb=true is off from here on: ") and why in line
    assert line.endswith("one of WANDB_MODE=offline, `wandb login` and WANDB_API_KEY")
    assert "planted" not in said


def test_wandb_that_hangs_does_not_keep_the_process_from_ending(tmp_path):
    (tmp_path / "wandb.py").write_text("""
import atexit, threading
def hang(*_, **__):
    threading.Event().wait()
def setup(*_):
    atexit.register(print, "hooks of others are kept")
    atexit.register(hang)
Settings, Image, init = dict, None, hang
""")
    said = run_on_a_terminal(tmp_path, {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, limit=1)
    assert "has not finished in time" in said
    assert said.strip().endswith("hooks of others are kept")
