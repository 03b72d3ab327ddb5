import io
import logging
import warnings

import pytest

from runtime.log import LOGGERS, StepLog, log_stage, setup_logging, write_stderr

VALUES = {
    "loss": 0.62134,
    "grad_norm": 0.84,
    "lr": 9.8e-4,
    "samples_per_s": 212.3,
    "data_wait_percent": 0.31,
    "encode_percent": 4.0,
    "memory_gib": 1.21,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch):
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {logger: logger.level for logger in (root, *map(logging.getLogger, LOGGERS))}
    monkeypatch.delenv("LOG_RANK", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
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
        "step   120/600  loss 0.6213  grad  0.84  lr 9.8e-04     212 samples/s  data  0.3 %  encode  4.0 %  mem 1.2 GiB"
    )
    assert "     8.2 samples/s" in lines[1]
    assert len({len(line) for line in lines}) == 1


def test_the_share_of_the_peak_is_shown_where_it_is_known(capsys):
    setup_logging(rank=0)
    steps = StepLog(600)
    steps.report(120, VALUES | {"mfu_percent": 41.25, "matmul_percent": 53.0})
    assert "212 samples/s  mfu 41.2 %  data  0.3 %  encode  4.0 %" in capsys.readouterr().err


def speak():
    for name in ("flux.model", "a_library"):
        logging.getLogger(name).info("%s tells", name)
        logging.getLogger(name).warning("%s warns", name)
        logging.getLogger(name).error("%s fails", name)
    warnings.warn("this way is old", stacklevel=1)


def told(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if ": " in line or " tells" in line]


def test_one_rank_tells_what_all_do_and_each_its_errors(capsys, recwarn):
    everything = [
        "flux.model tells",
        "warning: flux.model warns",
        "error: flux.model fails",
        "warning: a_library warns",
        "error: a_library fails",
    ]
    setup_logging(rank=0)
    speak()
    assert told(capsys) == everything and len(recwarn) == 1
    setup_logging(rank=1)
    speak()
    assert told(capsys) == ["error: flux.model fails", "error: a_library fails"] and len(recwarn) == 1


@pytest.mark.parametrize(
    ("chosen", "rank", "shown"), [("1", 1, True), ("1", 0, False), ("0,2", 2, True), ("0,12", 2, False), ("", 0, False)]
)
def test_log_rank_chooses_who_tells(capsys, monkeypatch, chosen, rank, shown):
    monkeypatch.setenv("LOG_RANK", chosen)
    setup_logging(rank)
    log_stage(1, 6, "mesh", "2 ranks")
    assert bool(capsys.readouterr().err) == shown


def test_only_the_rank_that_is_shown_has_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    setup_logging(rank=1)
    steps = StepLog(4, shown=False)
    steps.advance()
    steps.report(1, VALUES)
    steps.close()
    assert terminal.getvalue() == ""


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


def test_no_line_shows_a_secret(capsys):
    setup_logging(rank=0)
    logging.getLogger("flux").info("%s is asked again", "https://reader:p4ss@host/a.tar?sig=5ign")
    write_stderr("Traceback: hf_" + "aB3" * 12)
    assert capsys.readouterr().err == ("https://********@host/a.tar?sig=******** is asked again\nTraceback: ********\n")
