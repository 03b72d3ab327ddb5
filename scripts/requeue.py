"""Should a run that has ended be started again? run_slurm.sh and the pods of cluster/pytorchjob.yaml ask.

    began=$(python -m scripts.requeue begin --job.config_file FILE [--section.key value ...])
    ... the run ...
    again=$(python -m scripts.requeue end $began --job.config_file FILE [--section.key value ...])

`begin` checks the configuration, warns where a stop would lose work, removes the record of the last end
($FLUX_EXIT_RECORD) and prints the step of the newest checkpoint. `end` prints `again` or nothing, says why on stderr,
and leaves with the run's exit code: what $FLUX_EXIT_RECORD holds, or --code, which a launcher ended with.
Stopped from outside (75): always again. A hang (6) or a fault (1): only if a checkpoint was saved since `begin`, for
else the next start would end the same way. Everything else is over, or for a person to mend.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from checkpoint.steps import find_steps
from config.job_config import JobConfig
from config.parse import parse, read_number, read_process_count
from runtime import exit_codes
from runtime.exit_record import RECORD_NAME, RECORD_VARIABLE, announced_folder, forget_exit, read_exit_record
from runtime.stop import find_grace_risk, grace_seconds


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.requeue", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("begin", help="before the run; prints the step of its newest checkpoint", allow_abbrev=False)
    end = commands.add_parser("end", help="after it; prints `again` or nothing", allow_abbrev=False)
    end.add_argument("began", type=int, help="what `begin` printed")
    end.add_argument("--code", type=int, help="exit code of the run, where no record is collected")
    arguments, settings = parser.parse_known_args(argv)
    try:
        config, _ = parse(settings, count_processes(os.environ))
        grace = grace_seconds()
    except ValueError as error:
        print(error, file=sys.stderr)
        return exit_codes.CONFIG
    place = Path(os.environ.get(RECORD_VARIABLE, os.devnull))
    record = read_exit_record(place)
    folder = announced_folder(place) or Path(config.job.dump_folder)
    newest = max(find_steps(folder / config.checkpoint.folder), default=0)
    if arguments.command == "begin":
        record = record or read_exit_record(folder / RECORD_NAME)
        if risk := find_risk(config, grace, record["save_seconds"] if record else None):
            print(f"warning: {risk}", file=sys.stderr)
        if RECORD_VARIABLE in os.environ:  # there the first failure of the next start has the word
            forget_exit(place)
        print(newest)
        return exit_codes.OK
    if arguments.code is not None:
        record = {"code": arguments.code, "reason": f"exit code {arguments.code}"}
    record = record or {"code": exit_codes.ERROR, "reason": "nothing was recorded"}
    again, text = decide(record["code"], record["reason"], arguments.began, newest)
    print(text, file=sys.stderr)
    if again:
        print("again")
    return record["code"]


def count_processes(environment: Mapping[str, str]) -> int | None:
    """Processes of the whole run: $NGPU on each of $NNODES nodes; None: not known."""
    processes = read_process_count(environment)
    return processes and processes * read_number(environment, "NNODES", 1, least=1)


def find_risk(config: JobConfig, grace: float, save: float | None) -> str | None:
    """Why a stop would lose work.

    Args:
        grace: seconds that the ranks have after a signal.
        save: seconds that the longest save of the last start took; None: not known.
    """
    if not config.checkpoint.enable:
        return "checkpoint.enable=false: a stop loses this run, and it is not started again; add --checkpoint.enable"
    return None if save is None else find_grace_risk(save, grace)


def decide(code: int, reason: str, began: int, newest: int) -> tuple[bool, str]:
    """Whether to start again, and one line that says why.

    Args:
        reason: as the record has it.
        began: step of the newest checkpoint when the run was started.
        newest: the same, now.
    """
    ended = f"the run ended with code {code} ({reason})"
    if code == exit_codes.OK:
        return False, "the run is done"
    if code == exit_codes.PREEMPTED:
        return True, f"{ended}: it is started again"
    if code not in exit_codes.RESUMABLE:
        return False, f"{ended}: it is not started again"
    if newest > began:
        return True, f"{ended}, and had saved step {newest}: it is started again"
    return False, f"{ended}, without a checkpoint since its start: it is not started again"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
