import json
import math

import pytest

from training import metrics as metrics_module
from training.config import Metrics
from training.metrics import METRICS_NAME, MetricsLogger, peak_memory_gib


def read_lines(folder):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    lines = (folder / METRICS_NAME).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_one_object_per_step_with_every_digit_written_at_once(tmp_path):
    logger = MetricsLogger(tmp_path, Metrics(), {})
    loss = 0.1 + 0.2
    logger.log(1, {"loss": loss, "samples_seen": 64})
    (line,) = read_lines(tmp_path)  # before close: a run that dies loses no line
    assert line == {"step": 1, "loss": loss, "samples_seen": 64}
    logger.log(2, {"validation_loss": 1 / 3})
    logger.close()
    assert read_lines(tmp_path)[1] == {"step": 2, "validation_loss": 1 / 3}


def test_non_finite_values_are_valid_json_and_read_back(tmp_path):
    logger = MetricsLogger(tmp_path, Metrics(), {})
    logger.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    logger.close()
    (line,) = read_lines(tmp_path)
    assert math.isnan(float(line["loss"]))
    assert (float(line["grad_norm"]), float(line["lr"])) == (math.inf, -math.inf)


def test_a_run_that_goes_on_forgets_what_it_logged_after_its_checkpoint(tmp_path):
    kept = b'{"step": 10, "loss": 1.0}\n{"step":20,  "loss": "nan"}\nnot ours\n[7]\n'
    lost = b'{"step": 30, "loss": 0.5}\n'
    (tmp_path / METRICS_NAME).write_bytes(kept + lost + b'{"step": 20, "validation_loss": 0.1}\n' + b'{"step": 20, "lo')
    logger = MetricsLogger(tmp_path, Metrics(), {}, done=20)
    logger.log(30, {"loss": 0.25})
    logger.close()
    wanted = kept + b'{"step": 20, "validation_loss": 0.1}\n{"step": 30, "loss": 0.25}\n'
    assert (tmp_path / METRICS_NAME).read_bytes() == wanted
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_NAME]


def test_lines_that_stay_are_not_written_anew(tmp_path):
    path = tmp_path / METRICS_NAME
    path.write_text('{"step": 20}\n')
    before = path.stat().st_ino
    for done in (None, 20):
        MetricsLogger(tmp_path, Metrics(), {}, done).close()
    assert path.stat().st_ino == before
    MetricsLogger(tmp_path, Metrics(), {}).close()  # scores of a finished run are added
    assert path.read_text() == '{"step": 20}\n'
    MetricsLogger(tmp_path, Metrics(), {}, done=19).close()
    assert path.read_text() == ""


def test_a_failed_rewrite_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / METRICS_NAME
    path.write_text('{"step": 10}\n{"step": 20}\n')

    def refuse(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics_module.os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        MetricsLogger(tmp_path, Metrics(), {}, done=10)
    assert path.read_text() == '{"step": 10}\n{"step": 20}\n'


def test_a_full_disk_does_not_stop_training_and_loses_no_line(tmp_path, caplog):
    class Full:
        """A file whose flush fails while the disk is full, like a buffered file's."""

        def __init__(self, file):
            self.file, self.full, self.text = file, True, ""

        def write(self, text):
            self.text += text

        def flush(self):
            if self.full:
                raise OSError(28, "No space left on device")
            self.file.write(self.text)
            self.file.flush()
            self.text = ""

        def close(self):
            self.file.close()

    logger = MetricsLogger(tmp_path, Metrics(), {})
    logger._file = Full(logger._file)
    logger.log(1, {"loss": 1.0})
    assert "step 1 is not in metrics.jsonl yet" in caplog.text
    logger._file.full = False
    logger.log(2, {"loss": 1.0})
    logger.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]


def test_peak_memory_covers_what_this_process_once_held():
    before = peak_memory_gib("cpu")
    held = bytearray(b"x" * (64 * 2**20))
    after = peak_memory_gib("cpu")
    assert 0.01 < before <= after < 100
    assert after >= len(held) / 2**30
