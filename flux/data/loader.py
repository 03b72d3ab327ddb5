"""Positions -> RawBatch. Workers decode, crop, tokenize and draw; everything random is keyed by the position.

A position is a sample's place in the endless global order: epoch x length + place. The only state is one cursor, the
number of positions that finished steps have used; the loader's own state is never saved, since it breaks when the
number of workers changes.
"""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from flux.batch import Draws, RawBatch
from flux.codec import draw_noise
from flux.config import DataLoader as DataLoaderSection
from flux.data.errors import DataError
from flux.data.sample import Source
from flux.data.tokenizers import FluxTokenizer
from flux.data.transforms import fit_and_crop
from flux.flow import TimestepDistribution, draw_time, resolution_mu
from flux.rng import keyed_generator
from flux.spec import PIXELS_PER_TOKEN, ModelSpec

VALIDATION_TIMES = 8  # validation samples take the times (k + 0.5) / 8 in turn, as torchtitan does


@dataclass(frozen=True)
class TrainingDraws:
    """What is random about a training sample."""

    seed: int
    timestep_distribution: TimestepDistribution = "uniform"
    shift_by_resolution: bool = False
    drop_prob: float = 0.0  # probability that a prompt is replaced by the empty one
    drop_jointly: bool = False  # both encoders lose the prompt together; False: each by its own draw
    sample_posterior: bool = True


@dataclass(frozen=True)
class ValidationDraws:
    """Fixed noise and times per sample, no shuffle, no dropout, crop from the middle."""

    seed: int
    sample_posterior: bool = True


class _Item(NamedTuple):
    pixels_CHW: Tensor
    tokens: dict[str, Tensor]
    caption: str
    position: int
    t: Tensor
    noise_TC: Tensor
    posterior_noise_TC: Tensor | None


class PositionedDataset(Dataset):
    """position -> everything the encoders and the flow need for that sample.

    A faulty sample comes back as its DataError, which the loader raises in the main process: an exception in a worker
    would arrive with the worker's traceback wrapped into its text.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: FluxTokenizer,
        spec: ModelSpec,
        img_size: int,
        draws: TrainingDraws | ValidationDraws,
    ):
        self.source = source
        self.tokenizer = tokenizer
        self.spec = spec
        self.img_size = img_size
        self.draws = draws
        self.grid = (img_size // PIXELS_PER_TOKEN, img_size // PIXELS_PER_TOKEN)
        self.stream = "train" if isinstance(draws, TrainingDraws) else "validation"
        self._order: tuple[int, Tensor] | None = None  # (epoch, permutation)

    def __getitem__(self, position: int) -> _Item | DataError:
        try:
            sample = self.source[self._index(position)]
        except DataError as error:
            return error
        draws, training = self.draws, isinstance(self.draws, TrainingDraws)
        tokens = self.tokenizer([sample.caption])
        return _Item(
            pixels_CHW=fit_and_crop(
                sample.image, self.img_size, self._generator("crop", position) if training else None
            ),
            tokens=self._drop_prompts(tokens, position),
            caption=sample.caption,
            position=position,
            t=self._time(position),
            noise_TC=draw_noise(self._generator("noise", position), self.spec.codec, self.grid),
            posterior_noise_TC=(
                draw_noise(self._generator("posterior", position), self.spec.codec, self.grid)
                if draws.sample_posterior
                else None
            ),
        )

    def _generator(self, stream: str, position: int) -> torch.Generator:
        return keyed_generator(self.draws.seed, f"{self.stream}/{stream}", position)

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.source))
        if isinstance(self.draws, ValidationDraws):
            return place
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, torch.randperm(len(self.source), generator=self._generator("shuffle", epoch)))
        return int(self._order[1][place])

    def _time(self, position: int) -> Tensor:
        if isinstance(self.draws, ValidationDraws):
            return torch.tensor((position % VALIDATION_TIMES + 0.5) / VALIDATION_TIMES)
        tokens = self.grid[0] * self.grid[1]
        mu = resolution_mu(self.spec.schedule, tokens) if self.draws.shift_by_resolution else 0.0
        return draw_time(self._generator("timestep", position), self.draws.timestep_distribution, mu)

    def _drop_prompts(self, tokens: dict[str, Tensor], position: int) -> dict[str, Tensor]:
        """Classifier-free guidance learns from samples whose prompt was emptied (arXiv 2207.12598)."""
        if isinstance(self.draws, ValidationDraws) or not self.draws.drop_prob:
            return {key: ids[0] for key, ids in tokens.items()}
        empty = self.tokenizer([""])
        kept = {}
        for key, ids in tokens.items():
            stream = "drop" if self.draws.drop_jointly else f"drop/{key}"
            dropped = torch.rand((), generator=self._generator(stream, position)) < self.draws.drop_prob
            kept[key] = (empty[key] if dropped else ids)[0]
        return kept


def collate(items: list[_Item | DataError]) -> RawBatch | DataError:
    """Stacks samples; the first faulty one stands for the whole batch."""
    good: list[_Item] = []
    for item in items:
        if isinstance(item, DataError):
            return item
        good.append(item)
    posterior = [item.posterior_noise_TC for item in good if item.posterior_noise_TC is not None]
    return RawBatch(
        pixels_BCHW=torch.stack([item.pixels_CHW for item in good]),
        tokens={key: torch.stack([item.tokens[key] for item in good]) for key in good[0].tokens},
        captions=[item.caption for item in good],
        position_B=torch.tensor([item.position for item in good]),
        draws=Draws(
            t_B=torch.stack([item.t for item in good]),
            noise_BTC=torch.stack([item.noise_TC for item in good]),
            posterior_noise_BTC=torch.stack(posterior) if posterior else None,
        ),
    )


class PositionBatches:
    """Batches of positions, dealt so that every update uses the next `global_batch_size` positions on any layout.

    Within an update the positions go first over accumulation, then over ranks, then over the local batch. Every rank
    gets equally many full batches, since ranks wait for each other; what lies beyond `end` only fills up the last ones.
    """

    def __init__(
        self, cursor: int, local_batch_size: int, dp_rank: int = 0, dp_degree: int = 1, end: int | None = None
    ):
        self.cursor = cursor
        self.local_batch_size = local_batch_size
        self.dp_rank = dp_rank
        self.dp_degree = dp_degree
        self.end = end  # None: endless

    def __iter__(self) -> Iterator[list[int]]:
        step = self.dp_degree * self.local_batch_size
        for round_start in itertools.count(self.cursor, step):
            if self.end is not None and round_start >= self.end:
                return
            start = round_start + self.dp_rank * self.local_batch_size
            yield list(range(start, start + self.local_batch_size))


class Loader:
    """Iterates RawBatches from a cursor on; raises the DataError of a faulty sample."""

    def __init__(self, dataset: PositionedDataset, batches: PositionBatches, section: DataLoaderSection):
        self.dataset = dataset
        self.end = batches.end  # positions from here on only fill up batches and do not count; None: there are none
        workers = section.num_workers
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*set_vital", UserWarning)  # torchdata calls what torch has deprecated
            self._loader = StatefulDataLoader(
                dataset,
                batch_sampler=batches,
                collate_fn=collate,
                num_workers=workers,
                persistent_workers=section.persistent_workers and workers > 0,
                pin_memory=section.pin_memory and torch.cuda.is_available(),
                prefetch_factor=section.prefetch_factor if workers > 0 else None,
                snapshot_every_n_steps=2**31,  # the loader's own state is never used
            )

    def __iter__(self) -> Iterator[RawBatch]:
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def captions(self, count: int) -> list[str]:
        """Captions of the first samples of the source, at most `count`."""
        source = self.dataset.source
        return [source[index].caption for index in range(min(count, len(source)))]
