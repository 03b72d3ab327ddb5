import io
import logging

import pytest

from runtime.log import LOGGERS, StepLog, log_stage, setup_logging

VALUES = {
    "loss": 0.62134,
    "grad_norm": 0.84,
    "lr": 9.8e-4,
    "samples_per_s": 212.3,
    "data_wait_percent": 0.31,
    "memory_gib": 1.21,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def logging_as_before():
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {logger: logger.level for logger in (root, *map(logging.getLogger, LOGGERS))}
    yield
    root.handlers[:] = handlers
    for logger, level in levels.items():
        logger.setLevel(level)


def test_start_up_lines_are_aligned(capsys):
    setup_logging(rank=0)
    log_stage(1, 6, "mesh", "1 process on cpu")
    log_stage(5, 6, "optimizer", "AdamW")
    assert capsys.readouterr().err == "[1/6] mesh       1 process on cpu\n[5/6] optimizer  AdamW\n"


def test_step_lines_have_one_width(capsys):
    setup_logging(rank=0)
    steps = StepLog(600)
    steps.report(120, VALUES)
    steps.report(1, VALUES | {"loss": 1.9, "grad_norm": 12.3, "samples_per_s": 8.25, "data_wait_percent": 12.0})
    steps.report(600, VALUES | {"loss": float("nan")})
    steps.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "step   120/600  loss 0.6213  grad  0.84  lr 9.8e-04     212 samples/s  data  0.3 %  mem 1.2 GiB"
    )
    assert "     8.2 samples/s" in lines[1]
    assert len({len(line) for line in lines}) == 1


def test_other_ranks_only_warn(capsys):
    setup_logging(rank=1)
    logging.getLogger("flux.model").info("told by rank 0")
    logging.getLogger("flux.model").warning("a photograph is small")
    logging.getLogger("a_library").info("chatter")
    assert capsys.readouterr().err == "warning: a photograph is small\n"


def test_on_a_terminal_there_is_a_bar_and_lines_stay_whole(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    setup_logging(rank=0)
    steps = StepLog(4)
    steps.advance()
    steps.advance()
    steps.report(2, VALUES)
    logging.getLogger("train").info("a line in between")
    steps.close()
    text = terminal.getvalue()
    assert "2/4" in text and "loss 0.6213" in text
    assert "step     2/4" not in text
    assert "a line in between" in text.replace("\r", "\n").splitlines()
