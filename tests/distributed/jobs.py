"""Whole jobs on forked ranks, with the recipe's own launcher, and faults that happen to them: what an operator sees."""

import ctypes
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.launch import Launcher, Machine
from tests.distributed.ranks import CONTEXT
from tests.integration.short_runs import TINY, resize_tiny

FORK = multiprocessing.get_context("fork")
# The smallest transformer that has blocks of both kinds, and heads that two ranks can share.
SIZES = {"hidden_size": 64, "num_heads": 2, "depth": 1, "depth_single": 1}
OPTIONS = [*TINY, "--training.local_batch_size=2", "--validation.enable=false", "--debug.seed=1"]


@dataclass(frozen=True)
class Fault:
    """Something that happens to one rank when it begins a step, once in the life of a job.

    Args:
        kind: name of a method of `Faults`.
        step: number of the step; 0: the first one that begins after `seconds` of steps.
    """

    kind: str
    step: int = 0
    rank: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class Ended:
    """What is left of a job."""

    code: int
    record: dict[str, Any]
    seconds: float  # from the last fault, or the start, to the end
    told: str  # the launcher's last line


class ForkedRank:
    """A forked process with the face of `subprocess.Popen`."""

    def __init__(self, environment: dict[str, str], arguments: tuple[Any, ...]):
        # From the launcher, which has computed nothing: a fork server of its own would import everything again.
        self._process = FORK.Process(target=_train, args=(environment, *arguments), daemon=False)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self._process.pid, number)


def run_job(folder: Path, world: int, *options: str, faults: Sequence[Fault] = (), grace: float = 30) -> Ended:
    """Runs the launcher in a process of its own, as run_train.sh does, until the job has ended."""
    return await_job(start_job(folder, world, *options, faults=faults, grace=grace), folder)


def start_job(folder: Path, world: int, *options: str, faults: Sequence[Fault] = (), grace: float = 30):
    """Starts a job and returns its launcher's process."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("code", "record.json", "record.json.folder"):
        (folder / name).unlink(missing_ok=True)
    arguments = (str(folder), world, [*OPTIONS, f"--job.dump_folder={folder / 'run'}", *options], list(faults), grace)
    launcher = CONTEXT.Process(target=_launch, args=arguments, daemon=False)
    launcher.start()
    return launcher


def await_job(launcher: Any, folder: Path) -> Ended:
    began = time.time()
    launcher.join(timeout=240)
    assert launcher.exitcode is not None, "the job hangs"
    happened = [path.stat().st_mtime for path in folder.glob("fault-*")]
    record = folder / "run" / "exit.json"
    return Ended(
        int((folder / "code").read_text()),
        json.loads(record.read_text()) if record.exists() else {},
        time.time() - max([began, *happened]),
        (folder / "told").read_text(),
    )


def _launch(folder: str, world: int, argv: list[str], faults: list[Fault], grace: float) -> None:
    import contextlib

    home = Path(folder)
    os.environ["FLUX_EXIT_RECORD"] = str(home / "record.json")
    with (home / "told").open("w") as told, contextlib.redirect_stderr(told):
        launcher = Launcher(Machine(world), grace, home / "record.json", resumes="--checkpoint.enable" in argv)
        code = launcher.run(lambda environment: ForkedRank(environment, (folder, argv, faults)))
    (home / "code").write_text(str(code))


def _train(environment: dict[str, str], folder: str, argv: list[str], faults: list[Fault]) -> None:
    import torch

    import train

    log = open(f"{folder}/log-{environment.get('RANK', 0)}", "a", buffering=1)  # noqa: SIM115, it is stderr until the end
    os.dup2(log.fileno(), 2)
    sys.stderr = log
    os.environ.update(environment)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    resize_tiny(**SIZES)
    rank = int(environment.get("RANK", 0))
    mine = [fault for fault in faults if fault.rank == rank]
    if mine:
        Faults(Path(folder), mine).install(train.FluxTrainer)
    train.main(argv)


class Faults:
    """Lets faults happen to the trainer of this process."""

    def __init__(self, folder: Path, faults: list[Fault]):
        self._folder, self._faults = folder, faults

    def install(self, trainer_class: type) -> None:
        train_step, first = trainer_class.train_step, None

        def faulty_step(trainer, batches):
            nonlocal first
            first = first or time.monotonic()
            for number, fault in enumerate(self._faults):
                mark = self._folder / f"fault-{fault.rank}-{number}-{fault.kind}"
                is_due = fault.step == trainer.step + 1 if fault.step else time.monotonic() > first + fault.seconds
                if is_due and not mark.exists():
                    mark.touch()
                    getattr(self, fault.kind)(trainer)
            return train_step(trainer, batches)

        trainer_class.train_step = faulty_step

    def kill(self, trainer) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def crash(self, trainer) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def stop(self, trainer) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def term(self, trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def term_in_evaluation(self, trainer) -> None:
        """SIGTERM between two batches of the next evaluation."""
        must_stop, asked = trainer.evaluator.must_stop, []

        def signalled() -> bool:
            asked.append(1)
            if len(asked) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return must_stop()

        trainer.evaluator.must_stop = signalled

    def fail(self, trainer) -> None:
        raise RuntimeError("shapes differ")

    def hang(self, trainer) -> None:
        time.sleep(1e6)

    def hold(self, trainer) -> None:
        """Hangs with Python's lock held."""
        ctypes.PyDLL(None).sleep(10**6)

    def dawdle(self, trainer) -> None:
        time.sleep(2)

    def nan(self, trainer) -> None:
        """The errors of one micro-batch are no numbers."""
        errors = trainer.errors

        def spoiled(*arguments, **named):
            trainer.errors = errors
            return errors(*arguments, **named) * float("nan")

        trainer.errors = spoiled

    def leave_out(self, trainer) -> None:
        """This update is made by nobody."""
        import train

        originals = {name: getattr(train, name) for name in ("step_unless", "update_ema")}
        for name in originals:

            def nothing(*arguments, name=name):
                setattr(train, name, originals[name])

            setattr(train, name, nothing)

    def flip(self, trainer) -> None:
        """One bit of one weight is another one."""
        import torch

        from parallel.shards import local_part

        with torch.no_grad():
            local_part(next(trainer.model.parameters())).view(torch.int32).flatten()[0] ^= 2**12

    def lose_worker(self, trainer) -> None:
        """A data worker of this rank is killed."""
        (worker, *_) = multiprocessing.active_children()
        worker.kill()

    def break_logger(self, trainer) -> None:
        """Every sink of figures raises from here on, and metrics.jsonl cannot be written."""

        def broken(*arguments, **named):
            raise OSError(28, "No space left on device")

        if trainer.metrics:
            trainer.metrics._file.write = broken
            for sink in trainer.metrics._sinks:
                sink.put(lambda place: setattr(place, "log", broken))

    def fill_disk(self, trainer) -> None:
        """From here on, no file of this process may grow beyond some kilobytes."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, resource.RLIM_INFINITY))

    def empty_disk(self, trainer) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
