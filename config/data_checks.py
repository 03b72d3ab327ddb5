"""Rules between the keys that say what a run reads."""

import math
from collections.abc import Iterator

from config.job_config import JobConfig
from config.keys import show
from config.layout_checks import Finding
from flux.config import TIME_STEPS, Validation
from flux.spec import PIXELS_PER_TOKEN

# Data sets that lie somewhere: presets have a public place of their own, shapes draws its pictures.
_NEEDING_PATH = {
    "imagefolder": "the folder that holds the pictures and their captions",
    "webdataset": "the tars, such as data/*.tar or s3://bucket/{0000..0099}.tar",
    "parquet": "the parquet files or their folder",
    "cache": "the folder that scripts.preencode has written",
    "mlperf": "the folder of the pre-encoded samples",
}


def find_data_faults(config: JobConfig) -> Iterator[Finding]:
    """What cannot be read as it is asked for."""
    training, validation = config.training, config.validation
    needy = [("training", training.dataset, training.dataset_path)]
    # Without a data set of its own, validation holds back a part of training's.
    if validation.enable and validation.dataset is not None:
        needy.append(("validation", validation.dataset, validation.dataset_path))
    for section, dataset, path in needy:
        if dataset in _NEEDING_PATH and path is None:
            yield (
                (f"{section}.dataset", f"{section}.dataset_path"),
                f"{section}.dataset={show(dataset)} needs {section}.dataset_path: set it to {_NEEDING_PATH[dataset]}",
            )
    if config.encoder.mask_padding and "mlperf" in (
        training.dataset,
        validation.dataset,
        *(one.dataset for one in config.data.sources),
    ):
        yield (
            ("encoder.mask_padding", "training.dataset"),
            'encoder.mask_padding=true cannot hide the padding of training.dataset="mlperf", which does not tell where '
            "it is: set it to false, as that data set was encoded",
        )
    yield from _mixture(config)
    yield from _buckets(config)


def find_data_doubts(config: JobConfig) -> Iterator[str]:
    """What can be read, but probably not as meant."""
    training, validation = config.training, config.validation
    for section, dataset, path in (
        ("training", training.dataset, training.dataset_path),
        ("validation", validation.dataset or training.dataset, validation.dataset_path),
    ):
        if dataset == "shapes" and path is not None:
            yield f"{section}.dataset_path={show(path)} is not read: shapes draws its own pictures"
    if training.dataset == "mixture" and training.dataset_path is not None:
        yield f"training.dataset_path={show(training.dataset_path)} is not read: every one of data.sources has its own"
    if validation.enable and training.dataset_path is not None and training.dataset_path == validation.dataset_path:
        yield (
            f"validation.dataset_path={show(validation.dataset_path)} is training.dataset_path too, so nothing is held "
            "out: leave it out, and a part of the data is"
        )
    if validation.clip_score_path is not None and not (validation.enable and validation.eval_freq):
        yield (
            f"validation.clip_score_path={show(validation.clip_score_path)} is not read, since no pictures are drawn: "
            "set validation.enable and validation.eval_freq"
        )
    yield from _times(config.validation)
    if training.dataset == "parquet" and not config.data.shuffle_window:
        yield (
            "data.shuffle_window=0 shuffles all of the parquet files, and a whole row group is read for every sample: "
            "use a window such as 16 row groups, or encode the data set first (python -m scripts.preencode)"
        )


def _times(validation: Validation) -> Iterator[str]:
    """Fewer samples than times, or some at all times and the last one not."""
    batches, size = validation.steps, validation.local_batch_size
    count = batches * size
    if not validation.enable or batches == -1 or not count % TIME_STEPS:
        return
    if count < TIME_STEPS or validation.all_timesteps:
        yield (
            f"validation.steps={batches} x validation.local_batch_size={size} = {count} measurements do not take all "
            f"{TIME_STEPS} times equally often, so the loss is no mean over them: make it a multiple of {TIME_STEPS}, "
            f"such as {math.ceil(count / TIME_STEPS) * TIME_STEPS}"
        )


def _mixture(config: JobConfig) -> Iterator[Finding]:
    training, sources = config.training, config.data.sources
    names = ("training.dataset", "data.sources")
    if training.dataset == "mixture" and not sources:
        yield names, 'training.dataset="mixture" needs data.sources: write a [[data.sources]] table for each data set'
    elif sources and training.dataset != "mixture":
        yield (
            names,
            f'data.sources is not read with training.dataset={show(training.dataset)}: set training.dataset="mixture"',
        )
    if config.validation.dataset == "mixture":
        yield (
            ("validation.dataset",),
            'validation.dataset="mixture" must be one data set, or not set: then a part of every source is held out',
        )
    path = config.validation.dataset_path
    if training.dataset == "mixture" and path is not None and config.validation.dataset is None:
        yield (
            ("validation.dataset_path", "validation.dataset"),
            f"validation.dataset_path={show(path)} needs validation.dataset beside a mixture: say what kind of data "
            "set it is, or leave it out: then a part of every source is held out",
        )
    if sources and not sum(source.weight for source in sources):
        weights = ", ".join(f"{source.weight:g}" for source in sources)
        yield ("data.sources",), f"data.sources have the weights {weights}, which must not sum to 0: raise one of them"
    for number, source in enumerate(sources):
        if source.dataset in _NEEDING_PATH and source.dataset_path is None:
            yield (
                ("data.sources",),
                f"data.sources[{number}].dataset={show(source.dataset)} needs a dataset_path: set it to "
                f"{_NEEDING_PATH[source.dataset]}",
            )
    encoded = {source.dataset in ("cache", "mlperf") for source in sources if source.weight}
    if len(encoded) > 1:
        yield (
            ("data.sources",),
            "data.sources mix encoded data sets (cache, mlperf) with pictures, and must be all of one kind: "
            "encode the others too (python -m scripts.preencode --source N)",
        )


def _buckets(config: JobConfig) -> Iterator[Finding]:
    section, img_size = config.data.buckets, config.training.img_size
    if section.step % PIXELS_PER_TOKEN:
        below = section.step - section.step % PIXELS_PER_TOKEN
        yield (
            ("data.buckets.step",),
            f"data.buckets.step={section.step} must be a multiple of {PIXELS_PER_TOKEN}: use {below}",
        )
    if not section.enable:
        return
    for name, size in [("training.img_size", img_size)] + [
        ("data.buckets.img_sizes", size) for size in section.img_sizes
    ]:
        if size <= 0 or size % section.step:
            yield (
                (name, "data.buckets.step"),
                f"{name} has {size}, which must be a multiple of data.buckets.step={section.step}: "
                f"use {max(1, round(size / section.step)) * section.step}, or a smaller step",
            )
    if config.data.shuffle_window:
        yield (
            ("data.shuffle_window", "data.buckets.enable"),
            f"data.shuffle_window={config.data.shuffle_window} does not go with data.buckets.enable=true, whose "
            "updates take samples of one shape from everywhere: set it to 0",
        )
