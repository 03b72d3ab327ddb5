"""Memory that converting a model of real size takes: the peak of a whole conversion, as Linux counts it.

    python -m benchmarks.convert_memory --flavor flux-dev --to bfl diffusers dcp --folder /tmp

A file of Black Forest Labs with the names and shapes of the flavor is laid down as a hole, which takes no room on the
disk, and converted by the command that a user gives. What that writes is removed, and takes its full size until then.
The resident memory includes the program and its libraries; anonymous memory is what the process has asked for itself.
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from flux.identify import expected_shapes
from flux.spec import SPECS

_BYTES = 2  # of a bfloat16, as the models are published
_PAUSE = 0.02  # seconds between two looks at the process
_PROJECT = Path(__file__).resolve().parents[1]


class Peak(NamedTuple):
    """Of one conversion, in bytes."""

    resident: int
    anonymous: int
    seconds: float


def lay_down_hole(path: Path, flavor: str) -> tuple[int, int]:
    """Writes header and hole; returns the bytes of all tensors and of the largest."""
    header, end, largest = {}, 0, 0
    for name, shape in expected_shapes(SPECS[flavor].transformer).items():
        size = math.prod(shape) * _BYTES
        place = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        header[name.replace("_norm.weight", "_norm.scale")] = place
        end, largest = end + size, max(largest, size)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end, largest


def measure(command: list[str]) -> Peak:
    """Runs a command to its end. Raises RuntimeError if it fails."""
    begin, resident, anonymous = time.monotonic(), 0, 0
    with subprocess.Popen(command, cwd=_PROJECT) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            sizes = {name: 1024 * int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}
            resident = max(resident, sizes.get("VmHWM", 0))  # of all time, so that no look may miss it
            anonymous = max(anonymous, sizes.get("RssAnon", 0))
            time.sleep(_PAUSE)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    return Peak(resident, anonymous, time.monotonic() - begin)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--flavor", choices=sorted(SPECS), default="flux-tiny", help="model size (default: %(default)s)")
    add("--to", nargs="+", choices=["bfl", "diffusers", "dcp"], default=["bfl"], help="layouts to write (%(default)s)")
    add("--folder", type=Path, help="where source and target lie for the time (the system's own for such files)")
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    with TemporaryDirectory(dir=arguments.folder) as folder:
        source, target = Path(folder) / "source.safetensors", Path(folder) / "target.safetensors"
        total, largest = lay_down_hole(source, arguments.flavor)
        print(f"{arguments.flavor}: {total / 1e9:.2f} GB, largest tensor {largest / 1e9:.3f} GB")
        for layout in arguments.to:
            only = ["--transformer-only"] if layout == "diffusers" else []
            command = ["-m", "scripts.convert_checkpoint", "--to", layout, *only, str(source), str(target)]
            peak = measure([sys.executable, *command])
            shutil.rmtree(target) if target.is_dir() else target.unlink()
            print(
                f"{layout:>9}: peak {peak.resident / 1e9:.3f} GB resident, {peak.anonymous / 1e9:.3f} GB anonymous, "
                f"{(peak.resident - largest) / 1e9:.3f} GB above the largest tensor, {peak.seconds:.0f} s"
            )


if __name__ == "__main__":
    main()
