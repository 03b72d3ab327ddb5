"""The [job] and [debug] sections."""

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
