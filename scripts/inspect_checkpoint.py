"""Says what a checkpoint holds and whether it is whole. Nothing is loaded, and nothing in it can run code.

    python -m scripts.inspect_checkpoint outputs/run/checkpoint/step-1000      # one checkpoint, in full
    python -m scripts.inspect_checkpoint outputs/run                           # all checkpoints of a run, a line each

Every byte is read and compared with the SHA-256 that was noted when it was saved. Exit code 0: whole. 5: damaged; each
problem has a line. 2: there is no checkpoint.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.checkpoint import Metadata
from tqdm import tqdm

from checkpoint.compare import part_of
from checkpoint.config import PARTS
from checkpoint.dcp import TRAIN_STATE, read_train_state, tensor_entries
from checkpoint.errors import CheckpointError
from checkpoint.manifest import MANIFEST, FileEntry, find_problems, read_manifest
from checkpoint.safe_metadata import METADATA, read_metadata
from checkpoint.steps import find_steps
from runtime import exit_codes
from runtime.exit_record import recorded_exit

T = TypeVar("T")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.inspect_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a checkpoint (step-N), a folder of them, or a run")
    return parser


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint that a folder is, or those in it, or those of the run that it belongs to, oldest first.

    Raises:
        ValueError: there is none.
    """
    if any((folder / name).is_file() for name in (METADATA, MANIFEST, TRAIN_STATE)) or _is_named_step(folder):
        return [folder]
    inner = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for place in (folder, *inner):
        if steps := find_steps(place):
            return list(steps.values())
    what = "holds no checkpoint" if folder.is_dir() else "is no folder"
    raise ValueError(f"{folder} {what}: name a checkpoint such as outputs/run/checkpoint/step-1000, or a run's folder")


def _is_named_step(folder: Path) -> bool:
    folder = folder.resolve()
    return folder.is_dir() and folder in find_steps(folder.parent).values()


class Contents:
    """A checkpoint as its small files describe it; what is wrong with these is in `problems`."""

    def __init__(self, path: Path):
        self.path = path
        self.problems: list[str] = []
        has_metadata = (path / METADATA).is_file()
        # A folder that is not of this recipe (torchtitan's, say) has neither; one that lost one of them is damaged.
        self.is_foreign = has_metadata and not any((path / name).exists() for name in (MANIFEST, TRAIN_STATE))
        self.state: dict[str, Any] = self._read(read_train_state) or {}
        self.metadata = self._read(read_metadata) if has_metadata else None
        self.entries: dict[str, FileEntry] = (None if self.is_foreign else self._read(read_manifest)) or {}

    def _read(self, read: Callable[[Path], T]) -> T | None:
        try:
            return read(self.path)
        except (ValueError, OSError, CheckpointError) as error:
            self.problems.append(str(error))
            return None

    def find_problems(self) -> list[str]:
        """Reads every file. One line for each that is not as it was saved."""
        total = sum(entry.bytes for entry in self.entries.values())
        with tqdm(total=total, desc=self.path.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            try:
                found = find_problems(
                    self.path, self.entries, on_file=lambda name: _advance(bar, self.entries[name].bytes)
                )
            except OSError as error:
                found = [f"{self.path} cannot be read: {error}"]
        if self.is_foreign and self.metadata is not None:
            found += _find_short_files(self.path, self.metadata)
        # What could not be read because its file is damaged is told once, by the file.
        told = [str(self.path / name) for name in self.entries if any(str(self.path / name) in text for text in found)]
        return [text for text in self.problems if not any(name in text for name in told)] + found

    def describe(self) -> str:
        """What the checkpoint is, its parts and its files."""
        state = self.state
        facts = {
            "flavor": state.get("flavor"),
            "step": f"{state['step']:,}, {state.get('samples_seen', 0):,} samples seen" if "step" in state else None,
            "seed": state.get("seed"),
            "saved on": state.get("layout"),
            "torch": state.get("versions", {}).get("torch"),
        }
        lines = [f"  {name:<10}{value}" for name, value in facts.items() if value is not None]
        if self.is_foreign:
            lines.append(f"  not of this recipe: it has no {MANIFEST}, so flipped bytes cannot be found")
        tables = [_parts(self.metadata)] if self.metadata is not None else []
        tables.append(_files(self.path, self.entries))
        return "\n".join([str(self.path), *lines, *(f"\n{table}" for table in tables), ""])


def _advance(bar: tqdm, count: int) -> None:
    bar.update(count)


def _find_short_files(path: Path, metadata: Metadata) -> list[str]:
    """What can be told without a manifest: files that are missing or end too early."""
    needed: dict[str, int] = {}
    for info in metadata.storage_data.values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    problems = []
    for name, size in sorted(needed.items()):
        if not (path / name).is_file():
            problems.append(f"{path / name} is missing")
        elif (found := (path / name).stat().st_size) < size:
            problems.append(f"{path / name} has {found} bytes and must have {size} at least")
    return problems


def _parts(metadata: Metadata) -> str:
    rows = []
    tensors = tensor_entries(metadata)
    for part in ("model", *PARTS):
        entries = [entry for name, entry in tensors.items() if part_of(name) == part]
        numbers = sum(entry.size.numel() for entry in entries)
        size = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in entries)
        dtypes = sorted({str(entry.properties.dtype).removeprefix("torch.") for entry in entries})
        if entries:
            rows.append((part, f"{len(entries):,}", f"{numbers:,}", f"{size:,}", ", ".join(dtypes)))
    if others := len(metadata.state_dict_metadata) - len(tensors):
        rows.append(("no tensors", f"{others:,}", "", "", "pickled, never read"))
    return _table(("part", "tensors", "numbers", "bytes", "dtypes"), rows)


def _files(path: Path, entries: dict[str, FileEntry]) -> str:
    there = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    rows = []
    for name in sorted({*there, *entries}):
        digest = entries[name].sha256[:16] if name in entries else "" if name == MANIFEST else "not in the manifest"
        rows.append((name, f"{there[name]:,}" if name in there else "missing", digest))
    return _table(("file", "bytes", "SHA-256"), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need to be; all but the first and the last are numbers, to the right."""
    lines = [heads, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
    last = len(heads) - 1
    return "\n".join(
        "  "
        + "  ".join(
            text.rjust(width) if 0 < place < last else text.ljust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def summarize(contents: Contents) -> str:
    """A checkpoint on a line."""
    step, samples = contents.state.get("step"), contents.state.get("samples_seen", 0)
    size = sum(entry.bytes for entry in contents.entries.values())
    facts = f"step {step:,}, {samples:,} samples seen, {size:,} bytes" if step is not None else "not readable"
    return f"{contents.path}  {facts}"


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    paths = find_checkpoints(build_parser().parse_args(argv).folder)
    is_damaged = False
    for path in paths:
        contents = Contents(path)
        print(contents.describe() if len(paths) == 1 else summarize(contents), flush=True)
        problems = contents.find_problems()
        verdict = "its files are there" if contents.is_foreign else f"whole: all {len(contents.entries)} files"
        told = [f"damaged: {problem}" for problem in problems] or [verdict]
        print("\n".join(f"  {line}" for line in told), flush=True)
        is_damaged |= bool(problems)
    return exit_codes.CHECKPOINT if is_damaged else exit_codes.OK


if __name__ == "__main__":
    with recorded_exit(0, {ValueError: exit_codes.CONFIG}):
        sys.exit(main(sys.argv[1:]))
