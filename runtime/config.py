"""The [job], [debug] and [reliability] sections."""

from dataclasses import dataclass, field
from typing import Annotated


@dataclass(frozen=True)
class Job:
    """What is run, and where its results go."""

    # Where the other keys came from is not part of what they say, so it takes no part in comparisons.
    config_file: Annotated[str | None, "TOML file to read; all keys keep their defaults without one", "[1, inf)"] = (
        field(default=None, compare=False)
    )
    dump_folder: Annotated[str, "folder of the run: metrics, pictures, exports, exit.json", "[1, inf)"] = "./outputs"
    description: Annotated[str, "free text, kept with the run"] = "default job"
    print_config: Annotated[bool, "print the resolved configuration at the start"] = False


@dataclass(frozen=True)
class Debug:
    """What makes two runs comparable."""

    seed: Annotated[
        int | None,
        "seed of the weights, the data order and every draw; not set: one is drawn and written to the resolved file",
        "[0, 9223372036854775807]",
    ] = None
    deterministic: Annotated[
        bool, "only operations that give the same bits each time; an operation that cannot ends the run"
    ] = False
    deterministic_warn_only: Annotated[bool, "debug.deterministic warns of such an operation and goes on"] = False


@dataclass(frozen=True)
class Reliability:
    """What is done about faults: of the job system, of machines, and in the numbers."""

    stop_after_minutes: Annotated[
        float,
        "save and leave with code 75 when the run has taken this long, as on SIGTERM; 0: never",
        "[0, inf)",
    ] = 0.0
    watchdog: Annotated[bool, "end a run that stands still, with the stacks of all ranks, and name the guilty one"] = (
        True
    )
    step_limit_seconds: Annotated[
        float,
        "longest time for a step; 0: 20 times the median step, at least twice data.worker_timeout_seconds and 30",
        "[0, inf)",
    ] = 0.0
    phase_limit_seconds: Annotated[
        float,
        "longest time for building the run, for its first step, for a batch of validation, and for a step of drawing",
        "(0, inf)",
    ] = 600.0
    max_nonfinite: Annotated[
        int,
        "an update whose loss or gradients are no numbers is left out; after so many in a row the run ends with code 4",
        "[1, inf)",
    ] = 3
    spike_sigma: Annotated[
        float,
        "a loss or gradient norm so many standard deviations above the mean of the last 128 updates is a spike, and "
        "told; 0: none is",
        "[0, inf)",
    ] = 6.0
    skip_spikes: Annotated[bool, "leave out the update of a spike"] = False
    compare_replicas_freq: Annotated[
        int, "steps from one comparison of the replicas' weights to the next; 0: never", "[0, inf)"
    ] = 1000
