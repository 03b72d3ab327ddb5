"""The [checkpoint] section."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

# What a checkpoint holds beside the weights; the first four are torchtitan's names.
PARTS = ("optimizer", "lr_scheduler", "dataloader", "train_state", "ema")


@dataclass(frozen=True)
class Checkpoint:
    """What a run saves, so that it can go on after any stop, and what it leaves behind."""

    enable: Annotated[bool, "save checkpoints, and go on from the newest one when the same command is run again"] = (
        False
    )
    folder: Annotated[str, "folder of the checkpoints, inside the run folder", "[1, inf)"] = "checkpoint"
    interval: Annotated[int, "steps from one checkpoint to the next", "[1, inf)"] = 500
    interval_minutes: Annotated[
        float, "also save when the last save is this long ago, as seen at a logged step; 0: never", "[0, inf)"
    ] = 0.0
    keep_latest_k: Annotated[int, "older checkpoints than the latest k are deleted; 0: all are kept", "[0, inf)"] = 10
    keep_every: Annotated[
        int, "checkpoints of steps that this divides are never deleted; 0: there are none", "[0, inf)"
    ] = 0
    async_mode: Annotated[
        Literal["disabled", "async", "async_with_pinned_mem"],
        "write while training goes on, from a copy in the CPU's memory; pinned memory makes the copy from a GPU faster",
    ] = "disabled"
    timeout_seconds: Annotated[int, "longest wait of a process for the others in a save or a load", "[1, inf)"] = 1800
    enable_first_step_checkpoint: Annotated[bool, "also save after the first step: shows early whether it works"] = (
        False
    )
    create_seed_checkpoint: Annotated[
        bool, "one process saves the fresh weights as step 0 and ends, for runs that shall start alike"
    ] = False
    load_step: Annotated[
        int, "the step to go on from, which must be the newest; -1: the newest whole one", "-1 or [0, inf)"
    ] = -1
    load_only: Annotated[bool, "load and never save"] = False
    initial_load_path: Annotated[
        str | None,
        "weights to start from: a checkpoint (step-N, torchtitan's too) or, with initial_load_in_hf, a diffusers "
        "folder or a safetensors file; not read once the run has a checkpoint of its own",
        "[1, inf)",
    ] = None
    initial_load_model_only: Annotated[bool, "of initial_load_path take the weights only, and start at step 0"] = True
    initial_load_in_hf: Annotated[
        bool, "initial_load_path is a diffusers folder or a safetensors file of Black Forest Labs or of this recipe"
    ] = False
    exclude_from_loading: Annotated[
        list[str], "parts of a checkpoint that are not loaded but start anew, once", PARTS
    ] = field(default_factory=list)
    last_save_model_only: Annotated[
        bool,
        "also export the weights alone at the end, beside the last full checkpoint; a run that saves none always does",
    ] = True
    last_save_in_hf: Annotated[bool, "also export a diffusers pipeline folder at the end"] = False
    export_dtype: Annotated[
        Literal["float16", "bfloat16", "float32"], "number format of the weights that are exported at the end"
    ] = "float32"

    @property
    def saves(self) -> bool:
        return self.enable and not self.load_only

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether this step is to be saved."""
        first = self.enable_first_step_checkpoint and step == 1
        return self.saves and (step % self.interval == 0 or is_last or first)
