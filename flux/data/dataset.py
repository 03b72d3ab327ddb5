"""Position -> everything that the encoders and the flow need for the sample that stands there.

Everything random is keyed by the position. A bad sample never stops or moves anything: another one, named by the order,
takes its place with the same draws, and the batch tells what was wrong.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flux.batch import BadRecord, Draws, RawBatch
from flux.codec import draw_noise
from flux.config import TIME_STEPS
from flux.data.captions import choose_caption
from flux.data.decode import DecodeRules, decode_image
from flux.data.errors import BadSample, DataError
from flux.data.order import Place
from flux.data.sample import EncodedSample, EncodedSource, Sample, Source
from flux.data.tokenizers import FluxTokenizer
from flux.data.transforms import fit_and_crop
from flux.flow import TimestepDistribution, draw_time, resolution_mu
from flux.rng import keyed_generator
from flux.spec import LATENT_STRIDE, PIXELS_PER_TOKEN, ModelSpec

MAX_ATTEMPTS = 100  # samples that may be bad at one position; with 1 % bad ones, two in a row are rare


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
    midpoints: bool = True  # times (k + 0.5) / 8 for k = 0..7, as torchtitan does; False: k / 8, as MLPerf does
    all_timesteps: bool = False  # the times go round whatever a data set prescribes


@dataclass(frozen=True)
class OpenSource:
    """A source with what is done to its samples."""

    source: Source | EncodedSource
    rules: DecodeRules
    random_crop: bool = True


class Places(Protocol):
    """The part of an order that names what stands at a position."""

    def place(self, position: int, attempt: int = 0) -> Place: ...


class Slot(NamedTuple):
    """One sample that a batch asks for."""

    position: int
    counts: bool  # False: it only fills up the batch
    update_samples: int  # that count, in the whole update


class Item(NamedTuple):
    slot: Slot
    pixels_CHW: Tensor | None
    moments_CHW: Tensor | None
    tokens: dict[str, Tensor]
    t5_LE: Tensor | None
    t5_mask_L: Tensor | None
    pooled_V: Tensor | None
    caption: str
    key: str
    uncaptioned: bool
    t: Tensor
    noise_TC: Tensor
    posterior_noise_TC: Tensor | None
    bad: list[BadRecord]


class PositionedDataset(Dataset):
    """Slot -> Item. A fault of the whole data set comes back as its DataError, which the loader raises in the main
    process: an exception in a worker would arrive with the worker's traceback wrapped into its text.

    Args:
        sources: what the order's source numbers mean; either all of them are encoded, with the same parts, or none.
        places: the order.
        tokenizer: None where the sources hold everything that is made of prompts.
        spec: the flavor.
        draws: what is random.
        text_length: rows that stored T5 features are filled up to, which are hidden; None: they are whole.
    """

    def __init__(
        self,
        sources: Sequence[OpenSource],
        places: Places,
        tokenizer: FluxTokenizer | None,
        spec: ModelSpec,
        draws: TrainingDraws | ValidationDraws,
        text_length: int | None = None,
    ):
        self.sources = sources
        self.places = places
        self.tokenizer = tokenizer
        self.spec = spec
        self.draws = draws
        self.text_length = text_length
        self.stream = "train" if isinstance(draws, TrainingDraws) else "validation"

    def __getitem__(self, slot: Slot) -> Item | DataError:
        bad: list[BadRecord] = []
        try:
            for attempt in range(MAX_ATTEMPTS):
                place = self.places.place(slot.position, attempt)
                opened = self.sources[place.source]
                try:
                    sample = opened.source[place.number]
                    if isinstance(sample, EncodedSample):
                        return self._stored_item(slot, place, sample, cast(EncodedSource, opened.source), bad)
                    return self._item(slot, place, sample, opened, bad)
                except BadSample as error:
                    bad.append(BadRecord(slot.position, attempt, error.reason, error.shard, error.key, error.detail))
        except DataError as error:
            return error
        last = bad[-1]
        return DataError(
            f"{MAX_ATTEMPTS} samples drawn for position {slot.position} are bad, the last one {last.key!r} of "
            f"{last.shard!r} ({last.reason}: {last.detail}): mend the data set"
        )

    def _item(self, slot: Slot, place: Place, sample: Sample, opened: OpenSource, bad: list[BadRecord]) -> Item:
        try:
            image = decode_image(sample.image, opened.rules, place.size)
        except BadSample as error:
            raise BadSample(error.reason, error.detail, sample.key, sample.shard) from error
        crop = self._generator("crop", slot.position) if self._training and opened.random_crop else None
        caption = self._choose_caption(sample.captions, slot.position)
        tokens = self._tokenize(caption)
        dropped = self._dropped(tokens.keys(), slot.position)
        for part in dropped:
            tokens[part] = self._tokenize("")[part]
        return self._with_draws(
            slot,
            place,
            bad,
            pixels_CHW=fit_and_crop(image, place.size, crop),
            tokens={part: ids[0] for part, ids in tokens.items()},
            caption=caption,
            key=_name(sample),
            uncaptioned="t5" in dropped,
        )

    def _stored_item(
        self, slot: Slot, place: Place, sample: EncodedSample, source: EncodedSource, bad: list[BadRecord]
    ) -> Item:
        """Of a sample that is encoded already, but for the parts that run in training."""
        height, width = (LATENT_STRIDE * side for side in sample.moments_CHW.shape[-2:])
        if (width, height) != place.size:  # a substitute from another bucket
            raise BadSample("unreadable", f"it is stored as {width} x {height}", sample.key, sample.shard)
        stored = {"t5": sample.t5_LE, "clip": sample.pooled_V}
        live = [part for part, features in stored.items() if features is None]
        tokens: dict[str, Tensor] = {}
        for part in live:
            tokens[part] = self._tokenize(sample.caption)[part][0]
        dropped = self._dropped(stored.keys(), slot.position)
        for part in dropped:
            if part in live:
                tokens[part] = self._tokenize("")[part][0]
            else:
                stored[part] = source.empty()[part]
        t5_LE, mask_L = stored["t5"], None
        if t5_LE is not None and self.text_length is not None:
            rows = len(t5_LE)
            t5_LE = torch.nn.functional.pad(t5_LE, (0, 0, 0, self.text_length - rows))
            mask_L = torch.arange(self.text_length) < rows
        item = self._with_draws(
            slot,
            place,
            bad,
            moments_CHW=sample.moments_CHW,
            tokens=tokens,
            t5_LE=t5_LE,
            t5_mask_L=mask_L,
            pooled_V=stored["clip"],
            caption=sample.caption,
            key=_name(sample),
            uncaptioned="t5" in dropped,
        )
        if isinstance(self.draws, ValidationDraws) and sample.time_step is not None and not self.draws.all_timesteps:
            item = item._replace(t=self._validation_time(sample.time_step))
        return item

    def _with_draws(
        self,
        slot: Slot,
        place: Place,
        bad: list[BadRecord],
        tokens: dict[str, Tensor],
        caption: str,
        key: str,
        uncaptioned: bool,
        **made: Tensor | None,
    ) -> Item:
        width, height = place.size
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        position = slot.position
        parts = dict.fromkeys(("pixels_CHW", "moments_CHW", "t5_LE", "t5_mask_L", "pooled_V")) | made
        return Item(
            slot=slot,
            tokens=tokens,
            caption=caption,
            key=key,
            uncaptioned=uncaptioned,
            t=self._time(position, grid),
            noise_TC=draw_noise(self._generator("noise", position), self.spec.codec, grid),
            posterior_noise_TC=(
                draw_noise(self._generator("posterior", position), self.spec.codec, grid)
                if self.draws.sample_posterior
                else None
            ),
            bad=bad,
            **parts,
        )

    def _tokenize(self, prompt: str) -> dict[str, Tensor]:
        assert self.tokenizer is not None, "a data set that does not store all features needs a tokenizer"
        return self.tokenizer([prompt])

    @property
    def _training(self) -> bool:
        return isinstance(self.draws, TrainingDraws)

    def _generator(self, stream: str, position: int) -> torch.Generator:
        return keyed_generator(self.draws.seed, f"{self.stream}/{stream}", position)

    def _choose_caption(self, captions: Sequence[str], position: int) -> str:
        return choose_caption(captions, self._generator("caption", position)) if self._training else captions[0]

    def _time(self, position: int, grid: tuple[int, int]) -> Tensor:
        if isinstance(self.draws, ValidationDraws):
            return self._validation_time(position % TIME_STEPS)
        mu = resolution_mu(self.spec.schedule, grid[0] * grid[1]) if self.draws.shift_by_resolution else 0.0
        return draw_time(self._generator("timestep", position), self.draws.timestep_distribution, mu)

    def _validation_time(self, step: int) -> Tensor:
        assert isinstance(self.draws, ValidationDraws)
        return torch.tensor((step + 0.5 * self.draws.midpoints) / TIME_STEPS)

    def _dropped(self, parts: Collection[str], position: int) -> list[str]:
        """The encoders that get the empty prompt: classifier-free guidance learns from them (arXiv 2207.12598)."""
        if isinstance(self.draws, ValidationDraws) or not self.draws.drop_prob:
            return []
        return [
            part
            for part in parts
            if torch.rand(
                (), generator=self._generator("drop" if self.draws.drop_jointly else f"drop/{part}", position)
            )
            < self.draws.drop_prob
        ]


def _name(sample: Sample | EncodedSample) -> str:
    return f"{sample.shard}:{sample.key}" if sample.shard else sample.key


def collate(items: list[Item | DataError]) -> RawBatch | DataError:
    """Stacks samples; the first fault stands for the whole batch."""
    good: list[Item] = []
    for item in items:
        if isinstance(item, DataError):
            return item
        good.append(item)

    def stack(name: str) -> Tensor | None:
        parts = [getattr(item, name) for item in good]
        return None if parts[0] is None else torch.stack(parts)

    counts = [item.slot.counts for item in good]
    noise_BTC = stack("noise_TC")
    assert noise_BTC is not None
    return RawBatch(
        pixels_BCHW=stack("pixels_CHW"),
        moments_BCHW=stack("moments_CHW"),
        tokens={part: torch.stack([item.tokens[part] for item in good]) for part in good[0].tokens},
        t5_BLE=stack("t5_LE"),
        t5_mask_BL=stack("t5_mask_L"),
        pooled_BV=stack("pooled_V"),
        captions=[item.caption for item in good],
        keys=[item.key for item in good],
        uncaptioned_B=torch.tensor([item.uncaptioned for item in good]),
        position_B=torch.tensor([item.slot.position for item in good]),
        counts_B=None if all(counts) else torch.tensor(counts, dtype=torch.float32),
        update_samples=good[0].slot.update_samples,
        draws=Draws(
            t_B=torch.stack([item.t for item in good]),
            noise_BTC=noise_BTC,
            posterior_noise_BTC=stack("posterior_noise_TC"),
        ),
        bad=[record for item in good for record in item.bad if item.slot.counts],
    )
