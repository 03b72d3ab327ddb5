"""Names of data sets -> sources."""

from typing import Literal

from flux.data.imagefolder import ImageFolderSource
from flux.data.sample import Source
from flux.data.shapes import ShapesSource

Split = Literal["all", "train", "validation"]


def build_source(dataset: str, dataset_path: str | None, img_size: int, split: Split, section: str) -> Source:
    """A data set by name.

    Args:
        dataset: "shapes" or "imagefolder".
        dataset_path: the folder of pictures.
        img_size: side of procedural pictures in pixels.
        split: what of it; shapes always keep their held-out scenes out of training.
        section: configuration section named in messages, "training" or "validation".

    Raises:
        ValueError: a data set that cannot be opened here.
        DataError: a data set that is faulty.
    """
    if dataset == "shapes":
        return ShapesSource("validation" if split == "validation" else "train", img_size)
    if dataset == "imagefolder":
        if dataset_path is None:
            raise ValueError(f"{section}.dataset_path is missing: dataset='imagefolder' needs a folder of pictures")
        return ImageFolderSource(dataset_path, key=f"{section}.dataset_path", split=split)
    raise ValueError(
        f"{section}.dataset={dataset!r} cannot be opened by this version: use 'shapes', or 'imagefolder' with "
        f"{section}.dataset_path"
    )
