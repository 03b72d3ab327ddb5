"""run_slurm.sh: with stand-ins for Slurm's commands, and with a real Slurm where there is one."""

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.checkout import (
    ENDS,
    ENDS_AT_SIGNAL,
    PARTS,
    ROOT,
    make_checkout,
    read_environment,
    until,
    write_program,
)
from tests.integration.short_runs import TINY

# Stands for srun: starts the command once for each node, with the variables that --export names; the second may see
# other folders. As the real one, it hands SIGUSR1 on and ends the tasks at once on SIGTERM. Where a run is started, its
# exit code says nothing.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys

options = {{}}
while sys.argv[1].startswith("--"):
    name, _, value = sys.argv.pop(1).partition("=")
    options[name] = value
names = options["--export"].split(",")
kept = {{name: value for name, value in os.environ.items() if name in names or name.startswith("SLURM_")}}
folder = os.environ["SECOND"]
commands = [sys.argv[1:], [word.replace(os.getcwd(), folder) for word in sys.argv[1:]]]
tasks = [
    subprocess.Popen(
        commands[node],
        env={{**kept, "SLURM_NODEID": str(node), "SLURMD_NODENAME": f"node{{node}}"}},
        start_new_session=True,
    )
    for node in range(int(options["--ntasks"]))
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
signal.signal(signal.SIGTERM, lambda *_: [os.killpg(task.pid, signal.SIGKILL) for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(int(os.environ["SRUN_CODE"]) if "run_slurm.sh" in sys.argv else max(codes))
"""

SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
"show hostnames") seq -f node%g 7 5000 ;; # more than a pipe holds
*) echo "$*" >>calls; exit "${SCONTROL_CODE:-0}" ;;
esac
"""


class Stage:
    """A checkout in a folder of its own with a stand-in for Python, and for Slurm's commands or not."""

    def __init__(self, folder: Path, stand_ins: bool = True):
        self.folder = folder
        make_checkout(folder)
        slurm = {"srun": SRUN, "scontrol": SCONTROL, "squeue": "#!/bin/sh\necho $STATE\n"}
        for name, text in (slurm if stand_ins else {}).items():
            write_program(folder / "programs" / name, text)
        self.path = f"{folder / 'programs'}:/usr/bin:/bin"
        self.environment = {
            "PATH": self.path,
            "HOME": str(folder),
            "SLURM_JOB_ID": "5003",
            "SLURM_JOB_NODELIST": "node[7,9]",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_GPUS_ON_NODE": "2",
            "STATE": "RUNNING",
            "SRUN_CODE": "1",
            "SECOND": str(folder),
        }

    def start(self, launch: str, *arguments: str, **settings: str | None) -> subprocess.Popen:
        (self.folder / "launch").write_text(launch)
        (self.folder / "calls").touch()
        environment = {**self.environment, **settings}
        return subprocess.Popen(
            ["bash", "run_slurm.sh", *arguments],
            cwd=self.folder,
            env={name: value for name, value in environment.items() if value is not None},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, launch: str, *more: str, **settings: str | None) -> tuple[int, str]:
        """Exit code and what was said."""
        process = self.start(launch, "run.toml", "--checkpoint.enable", *more, **settings)
        said = process.communicate(timeout=60)[1]
        return process.returncode, said

    def requeued(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def seen(self, node: int) -> dict[str, str]:
        """The environment of a node's launch."""
        return read_environment(self.folder / f"environment-{node}")

    def wait_for_launch(self, nodes: int) -> None:
        until(lambda: all((self.folder / f"ready-{node}").exists() for node in range(nodes)))


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "a checkout")


@pytest.mark.parametrize("code", [0, 2])
def test_a_run_that_is_over_is_not_requeued(stage, code):
    assert stage.run(ENDS % code)[0] == code
    assert stage.requeued() == []


@pytest.mark.parametrize("srun_code", ["0", "137"])
def test_a_run_that_was_stopped_is_requeued_whatever_srun_says(stage, srun_code):
    code, said = stage.run(ENDS % 75, SRUN_CODE=srun_code)
    assert code == 75 and "(why): it is started again" in said
    assert stage.requeued() == ["requeue 5003"]


SAVES = "mkdir -p outputs/tiny/checkpoint/step-9\n"


@pytest.mark.parametrize(
    ("launch", "again"),
    [(ENDS % 6, False), (SAVES + ENDS % 6, True), ("exit 0", False), (SAVES + "exit 75", True)],
    ids=["hang", "hang-with-progress", "no-record", "no-record-with-progress"],
)
def test_a_fault_is_requeued_when_it_got_on(stage, launch, again):
    assert stage.run(launch)[0] == (6 if "6" in launch else 1)
    assert stage.requeued() == (["requeue 5003"] if again else [])


def test_a_job_that_its_user_cancelled_stays_so(stage):
    code, said = stage.run(ENDS % 75, STATE="COMPLETING")
    assert code == 75 and said.endswith("job 5003 is COMPLETING: it is not started again\n")
    assert stage.requeued() == []


def test_a_refused_requeue_is_told_and_not_tried_again(stage):
    code, said = stage.run(ENDS % 75, SCONTROL_CODE="1", STATE="")  # nor does squeue answer
    assert code == 75 and "submit the same command again" in said
    assert stage.requeued() == ["requeue 5003"]


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGUSR1]], ids=["once", "twice"])
def test_a_signal_to_the_script_reaches_every_node(stage, numbers):
    process = stage.start(ENDS_AT_SIGNAL, "run.toml", "--checkpoint.enable", SLURM_JOB_NUM_NODES="2")
    stage.wait_for_launch(nodes=2)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert sorted(set((stage.folder / "signals").read_text().split())) == ["0", "1"]
    assert stage.requeued() == ["requeue 5003"]


def test_the_stand_in_for_srun_kills_on_sigterm_as_the_real_one(stage):
    text = (ROOT / "run_slurm.sh").read_text()
    (stage.folder / "run_slurm.sh").unlink()
    (stage.folder / "run_slurm.sh").write_text(text.replace("kill -USR1", "kill -TERM"))
    process = stage.start(ENDS_AT_SIGNAL, "run.toml", "--checkpoint.enable")
    stage.wait_for_launch(nodes=1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1 and stage.requeued() == []


def test_nodes_differ_in_their_rank_alone_and_see_no_secret(stage):
    secrets = {name: "planted" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_OWN", "ASKED")}
    passed = {"NCCL_DEBUG": "WARN", "WANDB_MODE": "offline", "TORCH_LOGS": "x", "HF_HOME": "/h", "FLUX_EXPORT": "ASKED"}
    code, said = stage.run(
        ENDS % 0, "--job.description", "two words", SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="4", **secrets, **passed
    )
    assert code == 0, said
    first, second = stage.seen(0), stage.seen(1)
    assert {name for name in first if first[name] == "planted"} == {"ASKED"}
    assert {name: first[name] for name in passed} == passed
    different = {name for name in first if first[name] != second.get(name)} - {"SHLVL", "_"}
    assert different == {"NODE_RANK", "SLURM_NODEID", "SLURMD_NODENAME"} and (
        first["NODE_RANK"],
        second["NODE_RANK"],
    ) == ("0", "1")
    expected = {"MASTER_ADDR": "node7", "MASTER_PORT": "10012", "NNODES": "2", "NGPU": "4"}
    expected |= {"FLUX_GRACE_SECONDS": "210", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "210"}
    expected |= {"FLUX_EXIT_RECORD": str(stage.folder / "slurm-5003.json")}
    assert {name: first[name] for name in expected} == expected
    words = (stage.folder / "arguments-1").read_text().split("|")[2:-1]
    config = ["--job.config_file", "run.toml"]
    assert words == [*config, "--checkpoint.enable", "--job.description", "two words"]


def test_what_is_missing_is_named_in_one_line_before_anything_starts(stage):
    missing = {name: None for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE")}
    assert stage.run("", **missing) == (
        2,
        "Slurm's environment lacks SLURM_JOB_ID, SLURM_JOB_NUM_NODES, SLURM_GPUS_ON_NODE (or NGPU): start this script "
        "with sbatch, which sets them\n",
    )
    assert not (stage.folder / "environment-0").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "run_slurm.sh needs a configuration"),
        (["--training.steps", "5"], "run_slurm.sh needs a configuration"),
        (["run.toml", "--training.stepz", "5"], "training.stepz"),
    ],
)
def test_a_wrong_command_is_answered_before_anything_starts(stage, arguments, said):
    process = stage.start("", *arguments)
    assert said in process.communicate(timeout=60)[1] and process.returncode == 2
    assert not (stage.folder / "environment-0").exists()


def test_nodes_that_do_not_share_the_folder_are_named_before_anything_starts(stage):
    code, said = stage.run("", SLURM_JOB_NUM_NODES="2", SECOND="/elsewhere")
    assert code == 2 and "node1 does not see /elsewhere/slurm-5003.json.seen\n" in said
    assert said.endswith("all nodes of a job must see its folder: submit from a file system that they share\n")
    assert not (stage.folder / "environment-0").exists() and not list(stage.folder.glob("slurm-*"))


def test_a_start_after_a_long_save_warns_before_it_trains(stage):
    (stage.folder / "slurm-5003.json").write_text(json.dumps({"code": 75, "save_seconds": 300}))
    code, said = stage.run(ENDS % 0)
    assert code == 0 and said.startswith("warning: a save took 300 s")


def test_help_tells_the_command():
    done = subprocess.run(["bash", ROOT / "run_slurm.sh", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "sbatch --nodes=4 run_slurm.sh train_configs" in done.stdout
    assert "#" not in done.stdout and "set -e" not in done.stdout


def test_the_script_asks_for_a_signal_and_a_requeue():
    lines = (ROOT / "run_slurm.sh").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--signal=TERM@240", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(options)
    assert lines.index("#SBATCH --requeue") < next(n for n, line in enumerate(lines) if line and line[0] != "#")
    assert os.access(ROOT / "run_slurm.sh", os.X_OK)


# --- a real Slurm, where it is installed ---

COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
# Two nodes on this machine, whose names are addresses that it answers to. Without munge nobody is told from anybody.
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0
KillWait=10
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.2 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Slurm:
    """Slurm's commands, for a Slurm of two nodes that runs in a folder."""

    def __init__(self, folder: Path):
        self.conf = folder / "slurm.conf"
        settings = {"host": socket.gethostname(), "user": getpass.getuser(), "ports": free_ports(3), "folder": folder}
        self.conf.write_text(SLURM_CONF.format(**settings))
        (folder / "state").mkdir()

    def call(self, *command: str, **options) -> str:
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "SLURM_CONF": str(self.conf)}
        options = {"env": environment, "capture_output": True, "text": True, "timeout": 60, **options}
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, folder: Path, *arguments: str, nodes: int = 2, **settings: str) -> str:
        """The job's id."""
        environment = {"SLURM_CONF": str(self.conf), "HOME": str(folder), "NGPU": "1", **settings}
        options = [f"--nodes={nodes}", "--gpus-per-node=0", "--time=10", "--parsable"]
        return self.call("sbatch", *options, "run_slurm.sh", *arguments, cwd=folder, env=environment)

    def state(self, job: str) -> dict[str, str]:
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, state: str) -> None:
        ends = {state, "FAILED", "CANCELLED", "COMPLETED", "TIMEOUT", "NODE_FAIL"}
        until(lambda: self.state(job)["JobState"] in ends, seconds=120)
        assert self.state(job)["JobState"] == state, (self.conf.parent / "slurmctld.log").read_text()[-2000:]

    def start_soon(self, job: str) -> None:
        """A requeued job waits for two minutes, since a node refuses a start that is not later than the second in which
        its last one was revoked ("Job credential revoked"); three seconds are enough for nodes with one clock."""
        self.wait_for(job, "PENDING")
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        pytest.skip(f"Slurm is not installed: {', '.join(missing)} is not on the PATH")
    folder = tmp_path_factory.mktemp("slurm")
    real = Slurm(folder)
    daemons = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "127.0.0.1"], ["slurmd", "-D", "-N", "127.0.0.2"]]
    with contextlib.ExitStack() as stack, open(folder / "daemons.log", "w") as log:
        for command in daemons:
            process = subprocess.Popen([*command, "-f", str(real.conf)], stdout=log, stderr=log)
            stack.callback(process.wait, timeout=30)
            stack.callback(process.terminate)
        try:
            until(lambda: real.call("sinfo", "-h", "-o", "%D %T") == "2 idle")
        except AssertionError:
            pytest.skip(f"Slurm does not run here: {(folder / 'daemons.log').read_text()[-500:]}")
        yield real
        real.call("scancel", "--user", getpass.getuser())


@pytest.fixture
def checkout(tmp_path):
    return Stage(tmp_path / "a checkout", stand_ins=False)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["scancel", "--signal=TERM"], ["scancel", "--batch", "--signal=USR1"]])
def test_a_real_job_is_requeued_and_goes_on(slurm, checkout, command):
    path = f"{checkout.path}:{os.environ['PATH']}"
    (checkout.folder / "launch").write_text(ENDS_AT_SIGNAL)
    job = slurm.submit(checkout.folder, "run.toml", "--checkpoint.enable", PATH=path, HF_TOKEN="planted")
    checkout.wait_for_launch(nodes=2)
    first, second = checkout.seen(0), checkout.seen(1)
    assert (first["NODE_RANK"], second["NODE_RANK"]) == ("0", "1") and "HF_TOKEN" not in first
    assert first["MASTER_ADDR"] == second["MASTER_ADDR"] == "127.0.0.1"
    slurm.call(*command, job)
    (checkout.folder / "launch").write_text(ENDS % 0)
    slurm.start_soon(job)
    slurm.wait_for(job, "COMPLETED")
    assert slurm.state(job)["Restarts"] == "1"
    log = (checkout.folder / f"slurm-{job}.log").read_text()
    assert "start 1: 2 nodes x 1 processes" in log and "start 2: 2 nodes x 1 processes" in log
    assert "it is started again" in log and log.endswith("the run is done\n")


@pytest.mark.slow
def test_a_real_job_that_is_cancelled_does_not_come_back(slurm, checkout):
    path = f"{checkout.path}:{os.environ['PATH']}"
    (checkout.folder / "launch").write_text(ENDS_AT_SIGNAL)
    job = slurm.submit(checkout.folder, "run.toml", "--checkpoint.enable", PATH=path)
    checkout.wait_for_launch(nodes=2)
    slurm.call("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    until(lambda: slurm.call("squeue", "-h", "-j", job) == "")
    log = (checkout.folder / f"slurm-{job}.log").read_text()
    assert "is COMPLETING: it is not started again" in log and slurm.state(job)["Restarts"] == "0"


@pytest.mark.slow
def test_a_real_run_goes_on_in_the_requeued_job_and_stays_when_it_is_done(slurm, tmp_path):
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for place in {*ROOT.glob("*.py"), *(ROOT / name for name in (*PARTS, "assets", "train_configs"))}:
        (folder / place.name).symlink_to(place)
    metrics = folder / "outputs" / "run" / "metrics.jsonl"
    more = ["--validation.enable=false", "--training.local_batch_size=2", "--checkpoint.enable", "--training.steps=12"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def submit() -> str:
        arguments = [TINY[0].partition("=")[2], *TINY[1:], *more, f"--job.dump_folder={metrics.parent}"]
        return slurm.submit(folder, *arguments, PATH=path, OMP_NUM_THREADS="1")

    def steps() -> list[int]:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [json.loads(line)["step"] for line in lines if "loss" in line]

    job = submit()
    until(lambda: 3 in steps(), seconds=90)
    slurm.call("scancel", "--signal=TERM", job)
    slurm.wait_for(job, "PENDING")
    record = json.loads((folder / f"slurm-{job}.json").read_text())
    saved = [int(place.name.removeprefix("step-")) for place in metrics.parent.glob("checkpoint/step-*")]
    assert (record["code"], [record["step"]], record["resumable"]) == (75, saved, True) and saved[0] < 12
    slurm.start_soon(job)
    slurm.wait_for(job, "COMPLETED")
    assert steps() == list(range(1, 13)) and slurm.state(job)["Restarts"] == "1"
    # The same command once more finds nothing left to do.
    job = submit()
    slurm.wait_for(job, "COMPLETED")
    assert steps() == list(range(1, 13))
