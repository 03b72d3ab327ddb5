"""What sources of training pictures hand out."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

HELD_OUT_SHARE = 20  # one sample in twenty is held out when a data set serves training and validation
HELD_OUT_MOST = 10_000


def held_out_count(samples: int) -> int:
    """How many of so many samples are held out, at least one."""
    return min(max(1, samples // HELD_OUT_SHARE), HELD_OUT_MOST)


class Sample(NamedTuple):
    """A picture, not decoded yet, with its captions."""

    image: bytes | Image.Image  # a JPEG, PNG or WebP file as it stands in the source; or an RGB picture, drawn here
    captions: tuple[str, ...]  # at least one
    key: str  # names the sample in messages; never a path to open
    shard: str = ""  # file that holds it


class EncodedSample(NamedTuple):
    """What frozen encoders have made of a picture and its caption; a cache holds such samples."""

    moments_CHW: Tensor  # mean and log-variance, [2 * latent_channels, H/8, W/8]
    t5_LE: Tensor | None  # features of the caption; None: T5 runs in training
    pooled_V: Tensor | None  # CLIP's pooled feature of it; None: CLIP runs in training
    caption: str  # what they are made from; "" where that is not recorded and nothing has to be encoded any more
    key: str
    shard: str
    time_step: int | None = None  # k of the validation time k/8, where the data set prescribes it


class Shard(NamedTuple):
    """A part of a source that is read together: a tar, a row group of parquet, a folder."""

    name: str
    bytes: int
    samples: int


class Source(Protocol):
    """A map-style data set: `source[index]` is the same sample whenever and by whomever it is asked for.

    Travels to loader workers by fork or pickle, so it holds no open connection of another process.
    """

    @property
    def shards(self) -> Sequence[Shard]:
        """In order of index: the first `shards[0].samples` indices are of the first shard, and so on."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample:
        """Raises BadSample."""
        ...

    def picture_sizes(self) -> np.ndarray:
        """(width, height) of the upright pictures by their headers, int32 [len, 2]; (0, 0) where that is unreadable."""
        ...


class EncodedSource(Protocol):
    """A map-style data set of what frozen encoders have made, such as a cache."""

    @property
    def shards(self) -> Sequence[Shard]: ...

    @property
    def parts(self) -> frozenset[str]:
        """What it holds: "moments", "t5", "clip"."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> EncodedSample:
        """Raises BadSample."""
        ...

    def picture_sizes(self) -> np.ndarray:
        """(width, height) of the pictures that were encoded, int32 [len, 2]."""
        ...

    def empty(self) -> dict[str, Tensor]:
        """Features of the empty prompt: "t5" [L, E] and "clip" [V], those of them that it holds."""
        ...
