"""The shortest run that still goes through everything, and what it wrote."""

import json
from dataclasses import replace
from pathlib import Path

from flux.spec import SPECS

TINY = [
    "--job.config_file=train_configs/flux_tiny.toml",
    "--training.img_size=32",
    "--training.local_batch_size=8",
    "--training.steps=4",
    "--training.dataloader.num_workers=0",
    "--validation.steps=2",
    "--validation.local_batch_size=4",
    "--validation.save_img_count=3",
    "--validation.denoising_steps=2",
    "--metrics.log_freq=1",
    "--lr_scheduler.warmup_steps=2",
    "--optimizer.lr=1e-3",
    "--training.timestep_distribution=uniform",
    "--training.timestep_shift=none",
]


def resize_tiny(**sizes: int) -> None:
    """From here on, flux-tiny has a transformer of other sizes in this process.

    What a short run on several processes takes is how many tensors each of them deals with for the first time.
    """
    tiny = SPECS["flux-tiny"]
    SPECS["flux-tiny"] = replace(tiny, transformer=replace(tiny.transformer, **sizes))


class Run:
    """A finished run and what it wrote."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.exit = json.loads((folder / "exit.json").read_text())

    def series(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if name in line]
