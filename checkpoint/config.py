"""The [checkpoint] section."""

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class Checkpoint:
    """What a run leaves behind."""

    export_dtype: Annotated[
        Literal["float16", "bfloat16", "float32"], "number format of the weights that are exported at the end"
    ] = "float32"
