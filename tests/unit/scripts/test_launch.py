"""What the launcher makes of the ends of its ranks."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import scripts.launch
from runtime.exit_record import RECORD_VARIABLE, RunEnd, read_exit_record, write_exit_record
from runtime.watchdog import RankStacks
from scripts.launch import Launcher, Machine, RankEnd, explain, main, read_machine

ROOT = Path(__file__).resolve().parents[3]
TINY = f"--job.config_file={ROOT / 'train_configs' / 'flux_tiny.toml'}"
HOST = socket.gethostname()


def record(code, text="the text", rank=0):
    return {"code": code, "reason": "the reason", "step": 3, "rank": rank, "text": text}


def ends(*codes, ours=()):
    """Ranks 0, 1, ... with these exit codes; `ours` were ended by the launcher."""
    return {rank: RankEnd(code, rank in ours) for rank, code in enumerate(codes)}


DONE, RAISED, STOPPED = record(0, ""), record(1, "Traceback ...\nRuntimeError: x"), record(143, "stopped by SIGTERM")
SAVED = record(75, "SIGTERM: saved step 3", rank=None)
KILLED = f"on {HOST} was ended by SIGKILL: did the machine run out of memory?"
HELD = [
    RankStacks(0, "a", [("/torch/distributed/x.py", 1, "wait")]),
    RankStacks(1, "b", [(f"{ROOT}/train.py", 7, "train_step")]),
]


@pytest.mark.parametrize(
    ("written", "failed", "stopped", "expected"),
    [
        (DONE, {}, None, (0, "")),
        (None, {}, None, (0, "")),
        # A rank said why.
        (record(2), ends(2, -15, ours=[1]), None, (2, "the text")),
        (record(3, rank=1), ends(-15, 3, ours=[0]), None, (3, "the text")),
        (record(4), ends(4, 4), None, (4, "the text")),
        (record(6), ends(6, -9, ours=[1]), None, (6, "the text")),
        (record(3), ends(3, -9, ours=[1]), None, (3, "the text")),  # the other one was stuck
        (record(3), ends(-11, 3), None, (3, "the text")),  # crashed on its way out
        (RAISED, ends(1, 1), None, (1, RAISED["text"])),
        (RAISED, ends(1, -9, ours=[1]), None, (1, RAISED["text"])),
        (SAVED, ends(75, 75), None, (75, SAVED["text"])),  # the time was over, or one rank got the signal
        # A rank was killed; what the others say is only that it does not answer.
        (None, ends(-9), None, (1, f"rank 0 {KILLED}")),
        (RAISED, ends(1, -9), None, (1, f"rank 1 {KILLED}")),
        (STOPPED, ends(-11, 143), None, (1, f"rank 0 on {HOST} was ended by SIGSEGV")),
        (STOPPED, ends(-6, -15, ours=[1]), None, (1, f"rank 0 on {HOST} was ended by SIGABRT")),
        (DONE, ends(-11), None, (1, f"rank 0 on {HOST} was ended by SIGSEGV")),  # after it was done
        # Nobody says why.
        (None, ends(1, 1), None, (1, "rank 0 ended with 1 and gave no reason")),
        (None, ends(7, -15, ours=[1]), None, (1, "rank 0 ended with 7 and gave no reason")),
        (STOPPED, ends(7, 143), None, (1, "rank 0 ended with 7 and gave no reason")),  # what the launcher's signal did
        (SAVED, ends(7, 75), None, (1, "rank 0 ended with 7 and gave no reason")),
        # The run was stopped from outside.
        (SAVED, ends(75, 75), signal.SIGTERM, (75, SAVED["text"])),
        (DONE, {}, signal.SIGTERM, (0, "")),  # it was done all the same
        (None, ends(130, 130), signal.SIGINT, (130, "interrupted by Ctrl-C")),
        (None, ends(-15, -15), signal.SIGTERM, (143, "stopped by SIGTERM")),
        (STOPPED, ends(143, 143), signal.SIGTERM, (143, "stopped by SIGTERM")),
        (RAISED, ends(1, 1), signal.SIGTERM, (1, RAISED["text"])),
        (record(3), ends(3), signal.SIGINT, (3, "the text")),  # it had failed before
    ],
)
def test_the_end_of_a_run(written, failed, stopped, expected):
    end = explain(written, failed, stopped, grace=30)
    assert (end.code, end.text) == expected


def test_a_run_that_could_not_save_in_time_says_so():
    end = explain(None, ends(-9, -9, ours=[0, 1]), signal.SIGTERM, grace=30)
    assert end.code == 1 and "killed 30 s later, before it had saved" in end.text and "FLUX_GRACE_SECONDS" in end.text


@pytest.mark.parametrize("written", [None, RAISED])
def test_a_rank_that_could_only_leave_its_stacks_is_named(written):
    end = explain(written, ends(1, 1), stacks=HELD)
    assert (end.code, end.text, end.rank) == (6, "hang: rank 1 on b stands still at train.py:7 in train_step", 1)


def test_what_another_machine_tells_is_not_told_again():
    assert explain(None, ends(-15, ours=[0]), elsewhere=True).text.startswith("another machine of the run has failed")
    assert explain(RAISED, ends(1), elsewhere=True).text == RAISED["text"]


class Stage:
    """Runs main() with stand-ins for the ranks; programs that would take this one's place are noted."""

    def __init__(self, monkeypatch):
        self.programs, self.environments, self.commands = [], [], []
        self.monkeypatch = monkeypatch
        self.program = "pass"
        self._start = subprocess.Popen
        monkeypatch.setattr(os, "execv", self._execv)
        monkeypatch.setattr(scripts.launch.subprocess, "Popen", self._popen)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setenv(RECORD_VARIABLE, "")  # what main() sets is put back
        monkeypatch.delenv(RECORD_VARIABLE)

    def _execv(self, program, argv):
        self.programs.append(argv)
        raise SystemExit(0)

    def _popen(self, command, env):
        self.commands.append(command)
        self.environments.append(env)
        return self._start([sys.executable, "-c", self.program], env=env | {"PYTHONPATH": str(ROOT)})

    def run(self, *argv, processes="2"):
        self.monkeypatch.setenv("NGPU", processes)
        return main([TINY, *argv])


@pytest.fixture
def stage(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell puts in the background ignores it
    yield Stage(monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_every_rank_is_told_its_place_and_all_arguments(stage, capfd):
    assert stage.run("--training.steps", "5", processes="4") == 0
    assert stage.commands == [[sys.executable, "train.py", TINY, "--training.steps", "5"]] * 4
    for rank, environment in enumerate(stage.environments):
        told = {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        assert told == {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
        assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 4))
        assert environment["FLUX_GRACE_SECONDS"] == "30"
    assert not Path(stage.environments[0][RECORD_VARIABLE]).parent.exists(), "nothing is left behind"
    assert capfd.readouterr() == ("", "")


def test_threads_that_the_user_chose_stay(stage, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    stage.run()
    assert stage.environments[0]["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("processes", ["1", ""])
def test_one_process_is_told_of_no_others(stage, monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", "8")  # a job system's
    assert stage.run(processes=processes) == 0
    assert stage.commands == [[sys.executable, "train.py", TINY]]
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & stage.environments[0].keys()


KILLS = "import os, time; os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)"


def test_the_recorded_end_counts_and_is_told_once(stage, capfd):
    stage.program = """
import os
from config.parse import read_process_count
from runtime.exit_record import recorded_exit
with recorded_exit(int(os.environ["RANK"]), {ValueError: 3}):
    read_process_count({"NGPU": "x"})
"""
    assert stage.run() == 3
    assert capfd.readouterr().err == "NGPU=x must be a number of processes, 1 or more\n"


def test_a_record_of_an_earlier_run_says_nothing_of_this_one(stage, tmp_path, monkeypatch):
    place = tmp_path / "record.json"
    monkeypatch.setenv(RECORD_VARIABLE, str(place))
    write_exit_record(RunEnd(0), 75, "SIGTERM: saved step 3")
    (tmp_path / "record.json.folder").write_text("/there")
    stage.program = """
from runtime.exit_record import recorded_exit
with recorded_exit(0, {}):
    pass
"""
    assert stage.run(processes="1") == 0
    assert read_exit_record(place)["code"] == 0 and not (tmp_path / "record.json.folder").exists()


def test_a_machine_without_room_for_all_ranks_keeps_none(stage, capfd, monkeypatch):
    started = []

    def start(command, env):
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(stage._popen(command, env))
        return started[0]

    stage.program = "import time; time.sleep(60)"
    monkeypatch.setattr(scripts.launch.subprocess, "Popen", start)
    assert stage.run() == 1
    assert capfd.readouterr().err == "[Errno 11] Resource temporarily unavailable\n"
    assert started[0].wait(timeout=10) == -signal.SIGKILL


def test_a_port_that_is_taken_is_told_in_one_line(stage, capfd, monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        assert stage.run() == 1
    told = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[W")]  # torch's own
    assert len(told) == 1 and told[0].startswith(f"MASTER_ADDR=localhost, MASTER_PORT={port} cannot be listened at: ")
    assert not stage.commands


def test_a_dead_rank_ends_the_others_at_once(stage, capfd):
    stage.program = KILLS
    began = time.monotonic()
    assert stage.run() == 1
    assert time.monotonic() - began < 10
    assert capfd.readouterr().err == f"rank 1 {KILLED}\n"


def test_a_rank_that_does_not_listen_is_killed(stage, capfd):
    stage.program = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sys.exit(7) if os.environ['RANK'] == '0' else time.sleep(60)"
    )
    began = time.monotonic()
    assert stage.run() == 1
    assert time.monotonic() - began < 10
    assert capfd.readouterr().err == "rank 0 ended with 7 and gave no reason\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_a_signal_is_passed_on(stage, capfd, number, code):
    me = os.getpid()
    stage.program = f"import os, time; os.environ['RANK'] == '0' and os.kill({me}, {int(number)}); time.sleep(60)"
    assert stage.run() == code
    assert len(capfd.readouterr().err.splitlines()[-1:]) == 1


def test_a_run_that_saves_has_its_grace_and_its_code(stage, capfd, monkeypatch):
    monkeypatch.setenv("FLUX_GRACE_SECONDS", "20")
    stage.program = f"""
import os, signal, sys, time
from runtime.exit_record import RunEnd, write_exit_record
def leave(number, frame):
    time.sleep(6)  # longer than the peer of a dead rank has
    write_exit_record(RunEnd(0), 75, "SIGTERM: saved step 3", "SIGTERM: saved step 3")
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
time.sleep(0.3)
os.kill({os.getpid()}, signal.SIGTERM) if os.environ["RANK"] == "0" else None
time.sleep(60)
"""
    assert stage.run() == 75
    assert capfd.readouterr().err == "SIGTERM: saved step 3\n"


def test_a_run_that_does_not_leave_in_its_grace_is_killed(stage, capfd, monkeypatch):
    monkeypatch.setenv("FLUX_GRACE_SECONDS", "1")
    stage.program = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(0.3)
os.kill({os.getpid()}, signal.SIGTERM) if os.environ["RANK"] == "0" else None
time.sleep(60)
"""
    began = time.monotonic()
    assert stage.run() == 1
    assert time.monotonic() - began < 10
    assert "killed 1 s later" in capfd.readouterr().err


def test_what_runs_in_the_background_does_not_listen_to_ctrl_c(stage):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stage.program = f"import os; os.kill({os.getpid()}, 2)"
    assert stage.run() == 0


def test_the_record_names_what_only_the_launcher_knows(tmp_path, monkeypatch):
    monkeypatch.setenv(RECORD_VARIABLE, str(tmp_path / "record.json"))
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "record.json.folder").write_text(str(run))
    write_exit_record(RunEnd(0, run, step=4), 1, "connection closed by peer")
    launcher = Launcher(Machine(2), 30, tmp_path / "record.json")
    code = launcher.run(lambda environment: subprocess.Popen([sys.executable, "-c", KILLS], env=environment))
    told = read_exit_record(run / "exit.json")
    assert code == 1 and told["rank"] == 1 and told["step"] == 4 and told["host"] == HOST
    assert told["reason"] == f"rank 1 {KILLED}" and told["resumable"]


def test_of_a_step_that_nobody_could_tell_the_record_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(RECORD_VARIABLE, str(tmp_path / "record.json"))
    (tmp_path / "record.json.folder").write_text(str(tmp_path))
    launcher = Launcher(Machine(1), 30, tmp_path / "record.json")
    kills = "import os; os.kill(os.getpid(), 9)"
    launcher.run(lambda environment: subprocess.Popen([sys.executable, "-c", kills], env=environment))
    told = read_exit_record(tmp_path / "exit.json")
    assert told["step"] is None and told["code"] == 1 and told["rank"] == 0


def test_pretended_processes_need_only_one(stage):
    with pytest.raises(SystemExit):
        stage.run("--comm.mode=fake_backend", processes="1024")
    assert stage.programs == [
        [sys.executable, "-m", "scripts.dry_run", "--ranks", "1024", TINY, "--comm.mode=fake_backend"]
    ]


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs NODE_RANK and MASTER_ADDR too"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "NNODES=2 needs MASTER_ADDR too"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2 must be below NNODES=2"),
        ({"NNODES": "two"}, "NNODES=two must be a number of at least 1"),
        ({"NNODES": "2", "NODE_RANK": "x", "MASTER_ADDR": "a"}, "NODE_RANK=x must be a number of at least 0"),
    ],
)
def test_a_job_system_that_says_too_little(environment, text):
    with pytest.raises(ValueError, match=text):
        read_machine(environment)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


MEETS = """
import os, sys, torch.distributed as dist
dist.init_process_group("gloo")
sums = [None] * 4
dist.all_gather_object(sums, int(os.environ["RANK"]))
assert sums == [0, 1, 2, 3]
if sys.argv[1] == "dies" and os.environ["RANK"] == "3":
    os.kill(os.getpid(), 9)
dist.barrier() if sys.argv[1] == "well" else __import__("time").sleep(60)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "codes"), [("well", [0, 0]), ("dies", [1, 1])])
def test_two_machines(tmp_path, kind, codes):
    """Here as two launchers that find each other over the network: ranks meet, and a death on one ends both."""
    port = free_port()
    program = (
        "import subprocess, sys\n"
        "from pathlib import Path\n"
        "from scripts.launch import Launcher, Machine\n"
        "node, port, place = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])\n"
        "command = [sys.executable, '-c', *sys.argv[4:]]\n"
        "start = lambda environment: subprocess.Popen(command, env=environment)\n"
        "sys.exit(Launcher(Machine(2, 2, node, 'localhost', port), 30, place).run(start))"
    )
    launchers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(node), str(port), str(tmp_path / f"record-{node}"), MEETS, kind],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    told = [launcher.communicate(timeout=120)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == codes, told
    if kind == "dies":
        assert told[1].endswith(f"rank 3 {KILLED}\n") and "another machine of the run has failed" in told[0]


@pytest.mark.parametrize(
    ("argv", "processes", "text"),
    [
        (["--training.stepz=1"], "2", "key 'training.stepz' is unknown"),
        (["--parallelism.tensor_parallel_degree=3"], "8", "must divide num_heads=8 of flux-tiny"),
        (["--parallelism.data_parallel_replicate_degree=3"], "8", "must divide the 8 processes of this run"),
        ([], "three", "NGPU=three must be a number of processes, 1 or more"),
    ],
)
def test_a_mistake_is_answered_once_before_anything_starts(stage, capfd, argv, processes, text):
    assert stage.run(*argv, processes=processes) == 2
    said = capfd.readouterr().err
    assert said.count(text) == 1 and not stage.commands and not stage.programs


def test_a_mistake_is_answered_without_torch():
    program = """
import sys
from scripts.launch import main
code = main(["--training.stepz=1"])
sys.exit("imported torch" if "torch" in sys.modules else code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"NGPU": "8"}, capture_output=True, text=True
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
