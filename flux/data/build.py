"""What a run trains and validates on, opened and dealt out. Training and validation never see the same picture."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from flux.config import TIME_STEPS, Data, DataSource, Encoder, Training, Validation
from flux.data.buckets import Bucket, BucketShuffle, assign_buckets, make_buckets
from flux.data.cache import CacheSource
from flux.data.dataset import OpenSource, PositionedDataset, TrainingDraws, ValidationDraws
from flux.data.decode import DecodeRules, parse_color
from flux.data.loader import HeldOutBatches, Loader, PositionBatches
from flux.data.order import BucketOrder, PlainOrder, ShuffledOrder
from flux.data.sample import EncodedSource
from flux.data.shuffle import Mixture, Shuffle
from flux.data.sources import Split, build_source, hold_out
from flux.data.tokenizers import FluxTokenizer
from flux.encoders import ALL_PARTS
from flux.fingerprint import describe_encoders
from flux.spec import PIXELS_PER_TOKEN, ModelSpec

STREAM = "train"  # of the keys of the training order
ENCODED = ("cache", "mlperf")  # data sets that hold features instead of pictures


class Deal(NamedTuple):
    """This process's part of every update."""

    seed: int
    group: int = 0  # its place among the groups that see different samples
    groups: int = 1
    sharing: int = 1  # processes that share the tokens of a sample


@dataclass(frozen=True)
class RunData:
    """The open data sets of a run, with the sections that say what is made of them."""

    training: Training
    validation: Validation
    data: Data
    encoder: Encoder
    spec: ModelSpec
    sources: list[OpenSource]
    weights: list[float]  # of the sources
    held_out: list[OpenSource]  # for validation; empty: there is none

    @property
    def needed_parts(self) -> frozenset[str]:
        """The encoders that have to run: "autoencoder", "t5", "clip"."""
        if self.validation.enable and self.validation.eval_freq:
            return ALL_PARTS  # pictures are drawn for prompts
        stored = [_stored_parts(opened) for opened in (*self.sources, *self.held_out)]
        return ALL_PARTS - frozenset.intersection(*stored)

    def describe(self) -> str:
        """Such as `shapes at 64 px`."""
        names = [one.dataset for one in self.data.sources if one.weight] or [self.training.dataset]
        shape = "buckets of about " if self.data.buckets.enable else ""
        sizes = self.data.buckets.img_sizes if shape and self.data.buckets.img_sizes else [self.training.img_size]
        return f"{' + '.join(names)} at {shape}{', '.join(map(str, sizes))} px"

    def describe_shards(self) -> list[list[tuple[str, int, int]]]:
        """(name, bytes, samples) of every shard of every training source: what the order of samples rests on."""
        return [[(one.name, one.bytes, one.samples) for one in opened.source.shards] for opened in self.sources]


def open_data(
    training: Training,
    validation: Validation,
    data: Data,
    encoder: Encoder,
    spec: ModelSpec,
    show_progress: bool = False,
) -> RunData:
    """Opens, and where that is due indexes, the data sets of training and validation.

    Args:
        show_progress: of an indexing that takes long; one process of a machine makes it, the others wait.

    Raises:
        ValueError: a data set that cannot be opened as configured.
        DataError: a data set that is faulty.
    """

    def open_one(one: DataSource, split: Split, section: str) -> OpenSource:
        return _open_source(one, split, section, training, data, encoder, spec, show_progress)

    elsewhere = validation.dataset is not None or validation.dataset_path is not None
    mixed = {f"data.sources[{number}]": one for number, one in enumerate(data.sources) if one.weight}
    trained = mixed or {"training": DataSource(training.dataset, training.dataset_path)}
    split: Split = "train" if validation.enable and not elsewhere else "all"
    sources = [open_one(one, split, section) for section, one in trained.items()]
    held_out: list[OpenSource] = []
    if validation.enable and elsewhere:
        name = validation.dataset or training.dataset
        validated = DataSource(name, validation.dataset_path)
        held_out = [open_one(validated, "validation" if name == "shapes" else "all", "validation")]
    elif validation.enable:
        held_out = [open_one(one, "validation", section) for section, one in trained.items()]
    weights = [one.weight for one in trained.values()]
    for opened in (sources, held_out):
        parts = [_stored_parts(one) for one in opened]
        if len(set(parts)) > 1:
            shown = " and ".join(", ".join(sorted(part)) or "nothing" for part in dict.fromkeys(parts))
            raise ValueError(f"data.sources store different parts, {shown}: encode them with the same --parts")
    return RunData(training, validation, data, encoder, spec, sources, weights, held_out)


def build_training_loader(run: RunData, tokenizer: FluxTokenizer | None, deal: Deal, cursor: int) -> Loader:
    """The endless training batches from position `cursor` on.

    Raises:
        ValueError: buckets that no picture is in, or that do not divide.
    """
    training, encoder = run.training, run.encoder
    update_size = training.update_size(deal.groups)
    mixture = Mixture(run.weights, deal.seed, STREAM) if len(run.sources) > 1 else None
    order: ShuffledOrder | BucketOrder
    if run.data.buckets.enable:
        order = BucketOrder(_bucket_shuffles(run, update_size, deal), mixture, update_size, deal.seed)
    else:
        size = (training.img_size, training.img_size)
        _check_one_shape(run.sources, size, "training.img_size")
        shards = [[shard.samples for shard in opened.source.shards] for opened in run.sources]
        shuffles = [
            Shuffle(samples, run.data.shuffle_window, deal.seed, _stream(number))
            for number, samples in enumerate(shards)
        ]
        order = ShuffledOrder(shuffles, mixture, size, update_size, deal.seed)
    draws = TrainingDraws(
        seed=deal.seed,
        timestep_distribution=training.timestep_distribution,
        shift_by_resolution=training.timestep_shift == "resolution",
        drop_prob=training.classifier_free_guidance_prob,
        drop_jointly=training.prompt_dropout == "joint",
        sample_posterior=encoder.sample_posterior,
    )
    dataset = PositionedDataset(run.sources, order, tokenizer, run.spec, draws, _text_length(encoder))
    batches = PositionBatches(
        update_size,
        training.accumulation(deal.groups),
        deal.group,
        deal.groups,
        cursor,
        update_samples=order.update_samples,
    )
    return Loader(dataset, batches, training.dataloader, run.data.worker_timeout_seconds)


def build_validation_loader(run: RunData, tokenizer: FluxTokenizer | None, deal: Deal) -> Loader:
    """Held-out samples, the same ones with the same noise and times at every pass.

    Raises:
        ValueError: stored shapes that are not those of the run, or cannot be shared out.
    """
    validation, encoder = run.validation, run.encoder
    sizes = np.concatenate([_held_out_sizes(run, opened) for opened in run.held_out])
    _check_sharing(sizes, deal.sharing)
    lengths = [len(opened.source) for opened in run.held_out]
    visits = TIME_STEPS if validation.all_timesteps else 1
    end = max(visits * sum(lengths), TIME_STEPS)  # a few pictures are shown at every time rather than each at one
    if validation.steps != -1:
        end = min(end, validation.steps * validation.local_batch_size)
    midpoints = validation.times == "midpoints"
    draws = ValidationDraws(deal.seed, encoder.sample_posterior, midpoints, validation.all_timesteps)
    order = PlainOrder(lengths, sizes, deal.seed, visits)
    dataset = PositionedDataset(run.held_out, order, tokenizer, run.spec, draws, _text_length(encoder))
    batches = HeldOutBatches(order.positions_by_size(end), validation.local_batch_size, deal.group, deal.groups)
    return Loader(dataset, batches, validation.dataloader, run.data.worker_timeout_seconds)


def find_data_change(saved: Sequence[Sequence[Sequence]], now: Sequence[Sequence[Sequence]]) -> str | None:
    """The first difference between the shards of a checkpoint and those of now, in words; None: there is none."""
    for number, (before, after) in enumerate(zip(saved, now, strict=False)):
        source = f"source {number} " if len(now) > 1 else ""
        for place, (old, new) in enumerate(zip(before, after, strict=False)):
            if list(old) != list(new):
                return f"{source}shard {place} was {_show_shard(old)} and is {_show_shard(new)}"
        if len(before) != len(after):
            extra = (before if len(before) > len(after) else after)[min(len(before), len(after))]
            return f"{source}had {len(before)} shards and has {len(after)}: {_show_shard(extra)} makes the difference"
    return None if len(saved) == len(now) else f"there were {len(saved)} sources and there are {len(now)}"


def _show_shard(shard: Sequence) -> str:
    name, size, samples = shard
    return f"{name} ({samples} samples, {size} bytes)"


def _open_source(
    one: DataSource,
    split: Split,
    section: str,
    training: Training,
    data: Data,
    encoder: Encoder,
    spec: ModelSpec,
    show_progress: bool,
) -> OpenSource:
    own = {name: value for name in _OVERRIDES if (value := getattr(one, name)) is not None}
    data = replace(data, **own)
    rules = DecodeRules(
        data.min_side, data.max_aspect, data.max_megapixels, parse_color(data.background), data.fast_jpeg
    )
    if one.dataset not in ENCODED:
        source = build_source(one.dataset, one.dataset_path, data, training.img_size, split, section, show_progress)
        return OpenSource(source, rules, data.random_crop)
    key = f"{section}.dataset_path"
    if one.dataset_path is None:
        raise ValueError(f'{key} is missing: dataset="{one.dataset}" needs the folder of the encoded samples')
    encoded: EncodedSource
    if one.dataset == "cache":
        encoded = cache = CacheSource(one.dataset_path, key, describe_encoders(encoder, training.test_mode))
        cache.check_widths(spec.transformer)
    else:
        from flux.data.mlperf import MLPerfSource  # only who reads it pays for the import of pyarrow

        encoded = MLPerfSource(one.dataset_path, key, spec, training.img_size, encoder.max_t5_encoding_len)
    return OpenSource(hold_out(encoded, split, key), rules)


_OVERRIDES = ("caption_field", "image_field", "random_crop", "min_side", "max_aspect")


def _stored_parts(opened: OpenSource) -> frozenset[str]:
    parts: frozenset[str] = getattr(opened.source, "parts", frozenset())
    return frozenset("autoencoder" if part == "moments" else part for part in parts)


def _text_length(encoder: Encoder) -> int | None:
    """With padding hidden, stored T5 features have no rows for it."""
    return encoder.max_t5_encoding_len if encoder.mask_padding else None


def _stream(source: int) -> str:
    """Key of the order of a source: the first one's is that of a source alone."""
    return f"{STREAM}/source {source}" if source else STREAM


def _check_one_shape(sources: Sequence[OpenSource], size: tuple[int, int], key: str) -> None:
    """Stored moments are of the shape that they were made in."""
    for opened in sources:
        if not _stored_parts(opened):
            continue
        sizes = opened.source.picture_sizes()
        other = np.flatnonzero((sizes != size).any(axis=1))
        if len(other):
            width, height = sizes[other[0]]
            raise ValueError(
                f"{key}={size[0]} is not the size of the stored pictures, one has {width} x {height}: set {key} to "
                "what they were encoded with; those of buckets need data.buckets.enable=true"
            )


def shown_sizes(run: RunData, opened: OpenSource) -> np.ndarray:
    """(width, height) in which every sample of a source is shown, int [len, 2]."""
    if run.data.buckets.enable:
        buckets, assigned = _assign(run, opened)
        return np.array([bucket.size for bucket in buckets])[assigned]
    return np.full((len(opened.source), 2), run.training.img_size)


def _held_out_sizes(run: RunData, opened: OpenSource) -> np.ndarray:
    """(width, height) in which every sample is shown in validation: squares, or as it was encoded in buckets."""
    if run.data.buckets.enable and _stored_parts(opened):
        return opened.source.picture_sizes()
    size = (run.training.img_size, run.training.img_size)
    _check_one_shape([opened], size, "training.img_size")
    return np.full((len(opened.source), 2), size)


def _assign(run: RunData, opened: OpenSource) -> tuple[list[Bucket], np.ndarray]:
    """The shapes for a source, and which of them each of its samples gets."""
    section, img_size = run.data.buckets, run.training.img_size
    sizes = opened.source.picture_sizes()
    if _stored_parts(opened):  # in the shapes that they were encoded in
        shapes, assigned = np.unique(sizes, axis=0, return_inverse=True)
        return [Bucket((int(width), int(height)), img_size) for width, height in shapes], assigned.ravel()
    buckets = make_buckets(section.img_sizes or [img_size], section.step, section.max_aspect)
    return buckets, assign_buckets(sizes, buckets)


def _bucket_shuffles(run: RunData, update_size: int, deal: Deal) -> list[BucketShuffle]:
    tokens = update_size * run.training.img_tokens
    shuffles = []
    shown: set[Bucket] = set()
    for number, opened in enumerate(run.sources):
        buckets, assigned = _assign(run, opened)
        shown |= {buckets[used] for used in np.unique(assigned)}
        batch_sizes = [
            max(1, min(update_size, tokens // bucket.tokens)) if run.data.buckets.constant_tokens else update_size
            for bucket in buckets
        ]
        shuffles.append(BucketShuffle(assigned, buckets, batch_sizes, deal.seed, _stream(number)))
    _check_buckets(run, shown, deal.sharing)
    return shuffles


def _check_buckets(run: RunData, shown: set[Bucket], sharing: int) -> None:
    """Raises ValueError for areas that no picture has, and shapes that cannot be shared out."""
    for img_size in run.data.buckets.img_sizes:
        if img_size not in {bucket.img_size for bucket in shown} and not _stored_parts(run.sources[0]):
            raise ValueError(
                f"data.buckets.img_sizes has {img_size}, and no picture has {img_size} x {img_size} = {img_size**2:,} "
                "pixels: leave it out"
            )
    _check_sharing(np.array(sorted(bucket.size for bucket in shown)), sharing)


def _check_sharing(sizes: np.ndarray, sharing: int) -> None:
    """Raises ValueError for shapes, (width, height), whose tokens cannot be shared out."""
    for width, height in np.unique(sizes, axis=0):
        tokens = width * height // PIXELS_PER_TOKEN**2
        if tokens % sharing:
            raise ValueError(
                f"parallelism.context_parallel_degree={sharing} must divide the {tokens} image tokens of every "
                f"bucket, also of {width} x {height} px: use a larger data.buckets.step, or a smaller degree"
            )
