"""Rules about saving and loading, on a whole JobConfig."""

from collections.abc import Iterator
from pathlib import PurePath

from checkpoint.config import Checkpoint
from config.job_config import JobConfig
from config.keys import show
from config.layout_checks import Finding

# Keys that only say how checkpoints are saved or which is gone on from. What files tend to keep ready for the day when
# checkpoints are switched on (folder, interval, what is exported at the end) is not among them.
_ABOUT_CHECKPOINTS = (
    "interval_minutes",
    "keep_latest_k",
    "keep_every",
    "async_mode",
    "enable_first_step_checkpoint",
    "load_step",
    "load_only",
)
TAKEN_FOLDERS = ("export",)  # what every run has in its folder


def find_checkpoint_faults(config: JobConfig, world_size: int | None) -> Iterator[Finding]:
    """Combinations of which a key cannot do what it says; `world_size` None: not known here."""
    yield from _folder(config)
    yield from _initial_load(config.checkpoint)
    yield from _seed_checkpoint(config.checkpoint, world_size)
    if config.reliability.stop_after_minutes and not config.checkpoint.saves:
        name = "reliability.stop_after_minutes"
        yield (
            (name, "checkpoint.enable"),
            f"{name}={show(config.reliability.stop_after_minutes)} saves and leaves, and this run saves nothing: set "
            "checkpoint.enable=true, without load_only",
        )


def find_checkpoint_doubts(config: JobConfig) -> Iterator[str]:
    """Keys that change nothing as things stand."""
    section, default = config.checkpoint, Checkpoint()
    from_elsewhere = section.initial_load_path is not None
    if not section.enable:
        unused = [name for name in _ABOUT_CHECKPOINTS if getattr(section, name) != getattr(default, name)]
        if section.exclude_from_loading and (not from_elsewhere or section.initial_load_model_only):
            unused.append("exclude_from_loading")
        for name in unused:
            yield f"checkpoint.{name}={show(getattr(section, name))} has no effect without checkpoint.enable=true"
    if not section.initial_load_model_only and not from_elsewhere:
        yield "checkpoint.initial_load_model_only=false has no effect without checkpoint.initial_load_path"
    if section.last_save_in_hf and section.enable and not section.last_save_model_only:
        yield (
            "checkpoint.last_save_in_hf=true has no effect with checkpoint.last_save_model_only=false, "
            "which exports nothing at the end"
        )


def _folder(config: JobConfig) -> Iterator[Finding]:
    name, folder = "checkpoint.folder", config.checkpoint.folder
    if PurePath(folder).parts != (folder,) or folder == "..":
        yield (
            (name,),
            f'{name}={show(folder)} must stay inside the run folder: give a plain name such as "checkpoint"',
        )
    others = {
        "metrics.save_tb_folder": config.metrics.save_tb_folder,
        "validation.save_img_folder": config.validation.save_img_folder,
        "profiling.save_traces_folder": config.profiling.save_traces_folder,
        "profiling.save_memory_snapshot_folder": config.profiling.save_memory_snapshot_folder,
    }
    for other, taken in [*others.items(), *(("the weights", taken) for taken in TAKEN_FOLDERS)]:
        if PurePath(taken) == PurePath(folder):
            yield (
                (name, *([other] if other in others else [])),
                f"{name}={show(folder)} is the folder of {other} too: give another name",
            )


def _initial_load(section: Checkpoint) -> Iterator[Finding]:
    if section.initial_load_in_hf and section.initial_load_path is None:
        yield (
            ("checkpoint.initial_load_in_hf", "checkpoint.initial_load_path"),
            "checkpoint.initial_load_in_hf=true needs checkpoint.initial_load_path: set it to a diffusers folder or a "
            "safetensors file",
        )
    if section.initial_load_in_hf and not section.initial_load_model_only:
        yield (
            ("checkpoint.initial_load_in_hf", "checkpoint.initial_load_model_only"),
            "checkpoint.initial_load_model_only=false asks for an optimizer, which a file of weights has not "
            "(initial_load_in_hf=true): set initial_load_model_only=true, or give a checkpoint and leave "
            "initial_load_in_hf out",
        )


def _seed_checkpoint(section: Checkpoint, world_size: int | None) -> Iterator[Finding]:
    name = "checkpoint.create_seed_checkpoint"
    if not section.create_seed_checkpoint:
        return
    if not section.enable:
        yield (
            (name, "checkpoint.enable"),
            f"{name}=true saves a checkpoint, and checkpoint.enable=false saves none: set checkpoint.enable=true",
        )
    if section.load_only:
        yield (
            (name, "checkpoint.load_only"),
            f"{name}=true saves, and checkpoint.load_only=true does not: leave one of them out",
        )
    if world_size is not None and world_size > 1:
        yield (name,), f"{name}=true is the work of one process, and there are {world_size}: start it with NGPU=1"
