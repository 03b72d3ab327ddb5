"""The [optimizer], [lr_scheduler], [ema], [metrics] and [profiling] sections."""

from dataclasses import dataclass
from typing import Annotated, Literal

BLOCK = 256  # neighbors in a row of a matrix that share a scale in 8 bits


@dataclass(frozen=True)
class Optimizer:
    """How gradients become weight updates."""

    name: Annotated[Literal["AdamW", "Adam"], "AdamW decays weights apart from the gradient, Adam adds L2 to it"] = (
        "AdamW"
    )
    lr: Annotated[float, "peak learning rate", "(0, inf)"] = 8e-4
    beta1: Annotated[float, "decay of the gradient's running mean", "[0, 1)"] = 0.9
    beta2: Annotated[float, "decay of the squared gradient's running mean", "[0, 1)"] = 0.95
    eps: Annotated[float, "added to the denominator of the update", "(0, inf)"] = 1e-8
    weight_decay: Annotated[float, "strength of the pull of all weights towards zero", "[0, inf)"] = 0.1
    implementation: Annotated[
        Literal["for-loop", "foreach", "fused"], "how the update is computed: fused is fastest, the numbers agree"
    ] = "fused"
    state_dtype: Annotated[
        Literal["float32", "bfloat16", "8bit"],
        "number format in which the running means are kept; 8bit is of matrices whose rows are multiples of 256, the "
        "rest stays float32",
    ] = "float32"
    bf16_rounding: Annotated[
        Literal["remainder", "stochastic"],
        "what becomes of the digits that a bfloat16 weight has no room for: remainder keeps them beside it, in 16 bits "
        "that make it an exact float32; stochastic rounds up or down by chance, right in the mean",
    ] = "remainder"

    def describe(self, weights: str) -> str:
        """Such as `AdamW, lr 0.001, 8bit means, bfloat16 weights with remainders`.

        Args:
            weights: their number format.
        """
        means = f", {self.state_dtype} means" if self.state_dtype != "float32" else ""
        rounded = {"remainder": "with remainders", "stochastic": "rounded stochastically"}[self.bf16_rounding]
        return f"{self.name}, lr {self.lr:g}{means}" + (
            f", bfloat16 weights {rounded}" if weights == "bfloat16" else ""
        )


@dataclass(frozen=True)
class LRScheduler:
    """Warm-up, plateau and decay of the learning rate."""

    warmup_steps: Annotated[int, "steps over which the learning rate rises linearly to its peak", "[0, inf)"] = 200
    total_steps: Annotated[int | None, "length of the whole schedule in steps; not set: training.steps", "[1, inf)"] = (
        None
    )
    decay_ratio: Annotated[
        float | None,
        "share of the schedule spent decaying, at its end; 0: no decay; not set: decay starts after the warm-up",
        "[0, 1]",
    ] = None
    decay_type: Annotated[Literal["linear", "sqrt", "cosine"], "shape of the decay"] = "linear"
    min_lr_factor: Annotated[float, "the decay ends at this share of optimizer.lr", "[0, 1]"] = 0.0


@dataclass(frozen=True)
class EMA:
    """A running mean of the weights, which draws better pictures than the weights of any one step."""

    enable: Annotated[bool, "keep an exponential moving average of the weights, in float32"] = False
    decay: Annotated[
        float, "share of the average that a step keeps; early steps keep less: (1 + step) / (10 + step)", "[0, 1)"
    ] = 0.9999


@dataclass(frozen=True)
class Metrics:
    """What is measured while training, and where it is sent. metrics.jsonl is always written."""

    log_freq: Annotated[int, "steps from one logged line to the next", "[1, inf)"] = 10
    enable_tensorboard: Annotated[bool, "also write TensorBoard event files"] = False
    save_tb_folder: Annotated[str, "folder of the event files, inside the run folder", "[1, inf)"] = "tb"
    enable_wandb: Annotated[bool, "also log to Weights & Biases (WANDB_MODE=offline needs no account)"] = False
    enable_mllog: Annotated[bool, "write MLPerf's log lines to mllog.txt in the run folder"] = False


@dataclass(frozen=True)
class Profiling:
    """What a step spends its time and a GPU its memory on: looked at once in so many steps."""

    enable_profiling: Annotated[bool, "write traces of steps, for ui.perfetto.dev or chrome://tracing"] = False
    save_traces_folder: Annotated[str, "folder of the traces, inside the run folder", "[1, inf)"] = "profile_traces"
    profile_freq: Annotated[int, "steps from one trace, or one memory snapshot, to the next", "[1, inf)"] = 10
    profiler_active: Annotated[
        int, "steps that a trace shows, the last of them a multiple of profile_freq", "[1, inf)"
    ] = 1
    profiler_warmup: Annotated[int, "steps before a trace that are recorded and dropped", "[0, inf)"] = 3
    enable_memory_snapshot: Annotated[
        bool, "record a GPU's allocations; snapshots for pytorch.org/memory_viz, also when its memory runs out"
    ] = False
    save_memory_snapshot_folder: Annotated[str, "folder of the snapshots, inside the run folder", "[1, inf)"] = (
        "memory_snapshot"
    )
