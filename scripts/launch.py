"""Starts a run on the processes of this machine; run_train.sh calls it.

    NGPU=8 python -m scripts.launch --job.config_file train_configs/flux_dev.toml [--section.key value ...]

It is torchrun for one machine with three things more: a mistake in the configuration is answered before torch is
imported, a failure is told in one line, and the exit code is the run's own (torchrun makes every failure a 1).
"""

import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from config.parse import ConfigError, load_config
from runtime import exit_codes
from runtime.exit_record import RECORD_VARIABLE


def main(argv: list[str]) -> int:
    """Returns the exit code; one process takes this one's place."""
    processes = int(os.environ.get("NGPU", "1"))
    try:
        config = load_config(argv, processes, quiet=True)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return exit_codes.CONFIG
    if config.comm.mode == "fake_backend":
        os.execv(sys.executable, [sys.executable, "-m", "scripts.dry_run", "--ranks", str(processes), *argv])
    if processes == 1:
        os.execv(sys.executable, [sys.executable, "train.py", *argv])
    # The products of one process would otherwise take all cores from the others.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "exit.json"
        os.environ[RECORD_VARIABLE] = str(record)
        failure = run_processes(processes, argv)
        return explain(failure, json.loads(record.read_text()) if record.exists() else None)


def run_processes(processes: int, argv: list[str]) -> str | None:
    """Runs train.py on that many processes; what the first one that failed died of, None: all went well."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)  # its own account of a failure, a page for each
    try:
        torchrun(
            [f"--nproc_per_node={processes}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "train.py", *argv]
        )
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        died = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        hint = ", as by a machine that runs out of memory" if died == "SIGKILL" else ""
        return f"rank {rank} ended with {died}{hint}"
    except SignalException as error:
        return f"stopped by {error.sigval.name}"
    return None


def explain(failure: str | None, record: dict | None) -> int:
    """Says what nobody has said yet, and returns the exit code of the run."""
    if failure is None:
        return exit_codes.OK
    if record is None or record["code"] == exit_codes.OK:
        print(failure, file=sys.stderr)
        return exit_codes.ERROR
    return record["code"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
