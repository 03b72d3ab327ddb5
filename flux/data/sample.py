"""What a source of training pictures hands out."""

from typing import NamedTuple, Protocol

from PIL import Image


class Sample(NamedTuple):
    image: Image.Image  # RGB, any size
    caption: str
    key: str  # names the sample in messages


class Source(Protocol):
    """A map-style data set: `source[index]` is the same sample whenever and by whomever it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...
