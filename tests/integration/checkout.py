"""A checkout whose launches are stood in for: what a job system's script does with a run, without the run."""

import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What a checkout holds of what the script needs.
PARTS = ["run_slurm.sh", "run_train.sh", "setup_env.sh", "requirements.txt", "scripts", "runtime", "config", "flux"]
PARTS += ["parallel", "checkpoint", "training", "redact.py"]

# Stands for the environment's Python: a launch is what the file `launch` says, and everything else is really done.
LAUNCHER = f"""#!/usr/bin/env bash
case "$*" in
"-m scripts.launch "*)
    printf '%s|' "$@" >>arguments-$NODE_RANK
    env >environment-$NODE_RANK
    source ./launch
    ;;
*) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""

# What a launch does. The signal's wait is short enough for a test that fails, and `wait` is what a trap ends.
ENDS = """echo '{"code": %s, "reason": "why", "save_seconds": null}' >"$FLUX_EXIT_RECORD" """
ENDS_AT_SIGNAL = f"""
record() {{ {ENDS % 75}; }}
trap 'echo $NODE_RANK >>signals; record; sleep 0.3; kill $!; exit' USR1 TERM
touch ready-$NODE_RANK
sleep 20 >/dev/null 2>&1 &
wait
"""


def write_program(place: Path, text: str) -> None:
    place.parent.mkdir(exist_ok=True)
    place.write_text(text)
    place.chmod(0o755)


def make_checkout(folder: Path) -> None:
    """Makes the folder, with run.toml as a configuration, and programs/python as the stand-in."""
    folder.mkdir()
    for name in PARTS:
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "train_configs" / "flux_tiny.toml", folder / "run.toml")
    write_program(folder / "programs" / "python", LAUNCHER)


def read_environment(place: Path) -> dict[str, str]:
    """What `env` wrote there."""
    return dict(line.split("=", 1) for line in place.read_text().splitlines() if "=" in line)


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Waits for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
