"""Data sets that torchtitan's FLUX configurations name."""

from typing import NamedTuple


class Preset(NamedTuple):
    """Where a data set is and what it looks like."""

    kind: str  # "webdataset" or "parquet"
    url: str | None  # None: it has no public home
    image_field: str | None = None
    caption_field: str | None = None


PRESETS = {
    "cc12m-wds": Preset("webdataset", "hf://datasets/pixparse/cc12m-wds/cc12m-train-{0000..2175}.tar"),
    # A small part of it that torchtitan's repository carries for its tests.
    "cc12m-test": Preset("webdataset", None),
    "coco-validation": Preset(
        "parquet", "hf://datasets/howard-hou/COCO-Text/data/validation-*.parquet", "image", "caption"
    ),
}
