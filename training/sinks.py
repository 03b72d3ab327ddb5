"""Where figures go beside metrics.jsonl: TensorBoard and Weights & Biases, each in a thread of its own."""

import atexit
import logging
import os
import platform
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

WANDB_ID_NAME = "wandb_id.txt"  # in the run folder
QUEUED = 1000  # entries that a sink may be behind
BUILD_SECONDS = 10.0
START_SECONDS = 60.0

log = logging.getLogger(__name__)


class Sink(Protocol):
    """A place for figures. Building one imports its library and starts its processes; a server is not asked yet."""

    def start(self) -> None: ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_image(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class SinkThread:
    """A sink that may raise or hang: it lives in a daemon thread, from the import of its library to its end.

    What is put in is taken in that order. A sink that raises, that has not started within START_SECONDS or does not
    finish in time is switched off with one warning. No method raises.

    Args:
        key: of the configuration, which enables it.
        library: the module whose exit hooks are dropped with it.
        needs: what must be given for it to start.
        build: called in the thread.
    """

    def __init__(self, key: str, library: str, needs: str, build: Callable[[], Sink]):
        self._key, self._library, self._needs, self._build = key, library, needs, build
        self._is_off = self._was_full = False
        self._built, self._started = threading.Event(), threading.Event()
        self._actions: queue.SimpleQueue[Callable[[Sink], None] | None] = queue.SimpleQueue()  # None: the end
        self._latest_start = time.monotonic() + START_SECONDS
        self._thread = threading.Thread(target=self._run, name=key, daemon=True)
        self._thread.start()

    def wait_until_built(self) -> None:
        """To be called before a process is forked: it inherits the lock of a module that is just being imported, which
        nobody opens there, and the pipe of a program that is just being started, whose end is then waited for here.
        """
        self._built.wait(BUILD_SECONDS)

    def put(self, action: Callable[[Sink], None]) -> None:
        """Hands over what is to be done with the sink, without waiting."""
        if not self._started.is_set() and time.monotonic() > self._latest_start:
            self._switch_off(f"it has not started within {START_SECONDS:g} s: {self._needs}")
        if self._is_off:
            return
        if self._actions.qsize() < QUEUED:
            self._actions.put(action)
        elif not self._was_full:
            self._was_full = True
            log.warning("%s=true: %d entries wait, and the next ones are left out", self._key, QUEUED)

    def end(self) -> None:
        """Nothing more is put in."""
        self._actions.put(None)

    def wait(self, seconds: float) -> None:
        """Waits after `end` until everything is written, or gives up."""
        if not self._is_off:
            self._thread.join(seconds)
            if self._thread.is_alive():
                self._switch_off("it has not finished in time, and may lack the last figures")
        if self._is_off:
            # They may wait for the same thing, and the process could not end: wandb's wait for its server.
            hooks: Any = _FunctionsOf(self._library)
            atexit.unregister(hooks)

    def _run(self) -> None:
        try:
            sink = self._build()
            self._built.set()
            sink.start()
            self._started.set()
            while not self._is_off and (action := self._actions.get()) is not None:
                action(sink)
            sink.close()
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
            self._switch_off(reason if self._started.is_set() else f"{reason}: {self._needs}")
        finally:
            self._built.set()

    def _switch_off(self, reason: str) -> None:
        if not self._is_off:
            log.warning("%s=true is off from here on: %s", self._key, reason)
            self._is_off = True  # not before: `wait` waits for a thread that is about to tell something


class _FunctionsOf:
    """Equals every function of a module and of those below it; atexit finds what to unregister by `==`."""

    def __init__(self, module: str):
        self._module = module

    def __eq__(self, other: object) -> bool:
        return f"{getattr(other, '__module__', None)}.".startswith(f"{self._module}.")


def start_tensorboard(folder: Path, done: int | None) -> SinkThread:
    """Event files.

    Args:
        done: the step that a run goes on from; what is there of later ones is hidden. None: nothing is.
    """
    needs = "it needs tensorboard installed, and a metrics.save_tb_folder that can be written"
    return SinkThread("metrics.enable_tensorboard", "tensorboard", needs, lambda: _TensorBoard(folder, done))


def start_wandb(folder: Path, run_config: Mapping[str, Any]) -> SinkThread:
    """Weights & Biases.

    Args:
        folder: the run folder.
        run_config: for its table of runs.
    """
    needs = "it needs wandb installed, and one of WANDB_MODE=offline, `wandb login` and WANDB_API_KEY"
    return SinkThread("metrics.enable_wandb", "wandb", needs, lambda: _Wandb(folder, run_config))


class _TensorBoard:
    def __init__(self, folder: Path, done: int | None):
        from torch.utils.tensorboard import SummaryWriter  # only runs that use it pay for the import

        self._writer = SummaryWriter(log_dir=str(folder), purge_step=None if done is None else done + 1)

    def start(self) -> None:
        """Asks no server."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, path: Path) -> None:
        import numpy
        from PIL import Image

        with Image.open(path, formats=("PNG",)) as picture:
            self._writer.add_image(name, numpy.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Project and mode come from wandb's own environment variables: WANDB_PROJECT (default "flux"), WANDB_MODE."""

    def __init__(self, folder: Path, run_config: Mapping[str, Any]):
        import wandb

        self._wandb, self._folder, self._config = wandb, folder, dict(run_config)
        platform.processor()  # wandb.init would start a program to find out; Python remembers
        wandb.setup(wandb.Settings(silent=True))  # or it would ask on the terminal for a key that is missing

    def start(self) -> None:
        folder, wandb = self._folder, self._wandb
        identity = folder / WANDB_ID_NAME
        known = identity.read_text().strip() if identity.exists() else None
        self._run = wandb.init(
            # A run that goes on stays one run. Steps that it has already sent are not taken twice; they are the same.
            id=known,
            resume="allow" if known else None,
            project=os.environ.get("WANDB_PROJECT", "flux"),
            name=folder.name,
            dir=str(folder),
            config=self._config,
            # The figures and the configuration are sent; code, patches and the command line stay here.
            settings=wandb.Settings(save_code=False, disable_git=True, x_disable_meta=True, console="off", silent=True),
        )
        identity.write_text(f"{self._run.id}\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()
