"""Encodes a data set once, so that training does not have to run the frozen encoders.

    python -m scripts.preencode --job.config_file train_configs/flux_schnell.toml --out cache/
    torchrun --nproc_per_node=8 -m scripts.preencode --job.config_file train_configs/flux_schnell.toml --out cache/
    ./run_train.sh --training.dataset cache --training.dataset_path cache/

Takes training.dataset with [data], [encoder] and training.img_size as training would. Every process encodes shards of
its own; the same command goes on after any stop, with any number of processes. --parts moments,clip leaves T5 to
training: a thirtieth of the bytes, and T5 is split over the ranks there. --estimate only says how large the cache will
be, and how long it will take. What was bad is noted in the cache, and training puts other samples in its place.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from build import build_encoders, build_run_layout
from config.job_config import JobConfig
from config.parse import load_config
from flux.config import DataSource, Validation
from flux.data.build import ENCODED, RunData, open_data, shown_sizes
from flux.data.cache import BAD_SAMPLES_FILE, FORMAT, PARTS, CacheSettings
from flux.data.cache_writer import CacheWriter, SamplesToEncode, check_parts, claim_cache, estimate_bytes
from flux.data.errors import DataError
from flux.data.tokenizers import build_tokenizer
from flux.fingerprint import describe_encoders
from flux.spec import SPECS
from parallel.config import Parallelism
from parallel.degrees import read_ranks
from parallel.mesh import Layout, close_layout
from runtime.exit_record import recorded_exit
from runtime.log import setup_logging
from train import EXIT_CODES

SHARD_BYTES = 2**30  # about what a shard has
BAD_WINDOW = 10_000  # samples over which the share of bad ones counts, as in training

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.preencode",
        usage="%(prog)s --out FOLDER [options] [--job.config_file FILE] [--section.key value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="the cache; one that was begun goes on")
    add(
        "--parts", default=",".join(PARTS), help="what is stored: moments, and t5 and clip or one of them (%(default)s)"
    )
    add("--t5-dtype", choices=("same", "fp8"), default="same", help="fp8 halves T5's bytes, with a scale per token")
    add("--batch-size", type=int, default=16, metavar="N", help="samples that are encoded together (%(default)s)")
    add("--samples-per-shard", type=int, metavar="N", help="as many as make about a gigabyte")
    add("--source", type=int, metavar="N", help="which of data.sources, for a mixture")
    add("--estimate", action="store_true", help="say what the cache will take, and end")
    return parser


class Plan(NamedTuple):
    """What is to be done, on every process the same."""

    run: RunData
    sizes: np.ndarray  # (width, height) in which every sample is encoded
    settings: CacheSettings
    total_bytes: int


def make_plan(arguments: argparse.Namespace, config: JobConfig, show_progress: bool) -> Plan:
    """Opens the data set and settles what the cache will hold.

    Raises:
        ValueError: nothing that can be encoded.
        DataError: a faulty data set.
    """
    parts = check_parts(arguments.parts)
    for name in ("batch_size", "samples_per_shard"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")
    config = choose_source(config, arguments.source)
    training, data, encoder, spec = config.training, config.data, config.encoder, SPECS[config.model.flavor]
    if training.dataset in ENCODED:
        raise ValueError(f'training.dataset="{training.dataset}" is encoded already: name the pictures')
    run = open_data(training, Validation(), data, encoder, spec, show_progress)
    (opened,) = run.sources
    sizes = shown_sizes(run, opened)
    t5_dtype = "float8_e4m3fn" if arguments.t5_dtype == "fp8" else encoder.dtype
    settings = CacheSettings(
        format=FORMAT,
        samples=len(sizes),
        samples_per_shard=0,
        parts=parts,
        t5_dtype=t5_dtype,
        encoders=describe_encoders(encoder, training.test_mode),
        pictures={
            "dataset": training.dataset,
            "sizes": sorted({f"{width}x{height}" for width, height in np.unique(sizes, axis=0)}),
            "seed": config.debug.seed or 0,
            "random_crop": opened.random_crop,
            "rules": asdict(opened.rules),
            "caption_field": data.caption_field,
            "image_field": data.image_field,
            "empty_caption": data.empty_caption,
        },
        shards=run.describe_shards()[0],
    )
    total = estimate_bytes(settings, sizes, spec)
    per_shard = arguments.samples_per_shard or max(1, round(SHARD_BYTES * len(sizes) / total))
    return Plan(run, sizes, settings._replace(samples_per_shard=min(per_shard, len(sizes))), total)


def choose_source(config: JobConfig, number: int | None) -> JobConfig:
    """The configuration with one data set, which a mixture's part becomes.

    Raises:
        ValueError: a mixture without --source, or the other way round.
    """
    sources = config.data.sources
    if not sources and number is not None:
        raise ValueError(f"--source={number} is for a mixture, and data.sources is empty: leave it out")
    if not sources:
        return config
    if number is None or not 0 <= number < len(sources):
        raise ValueError(
            f"--source={number} must be one of the {len(sources)} data.sources, 0 to {len(sources) - 1}: each has a "
            "cache of its own, and the mixture then names the caches"
        )
    one: DataSource = sources[number]
    own = ("caption_field", "image_field", "random_crop", "min_side", "max_aspect")
    changes = {name: value for name in own if (value := getattr(one, name)) is not None}
    training = replace(config.training, dataset=one.dataset, dataset_path=one.dataset_path)
    return replace(config, training=training, data=replace(config.data, sources=[], **changes))


def preencode(arguments: argparse.Namespace, config: JobConfig, layout: Layout) -> None:
    """Writes this process's shards."""
    shown = layout.rank == 0
    plan = make_plan(arguments, config, show_progress=shown)
    run, settings = plan.run, plan.settings
    spec, encoder = run.spec, run.encoder
    needed = {"autoencoder", "t5", "clip"} if arguments.estimate else {"autoencoder", *settings.parts} - {"moments"}
    tokenizer = build_tokenizer(encoder, run.training.test_mode)
    encoders = build_encoders(config, spec, tokenizer, layout, needed | {"autoencoder"})
    writer = CacheWriter(arguments.out, settings, encoders, arguments.batch_size)
    samples = SamplesToEncode(run.sources[0], plan.sizes, tokenizer, settings.pictures["seed"])

    todo = list(range(settings.shard_count))
    if not arguments.estimate:
        todo = json.loads(
            layout.from_rank_0("missing shards", lambda: json.dumps(claim_cache(arguments.out, settings)))
        )
    left = sum(min(settings.samples_per_shard, settings.samples - shard * settings.samples_per_shard) for shard in todo)
    if shown:
        seconds = time_batch(writer, samples) * left / arguments.batch_size / layout.degrees.world if left else 0.0
        log.info("%s", describe(plan, arguments.out, left, seconds, layout.degrees.world))
    if arguments.estimate:
        return
    check_room(arguments.out, plan.total_bytes * left / settings.samples)
    if shown:
        writer.write_empty()
    mine = todo[layout.rank :: layout.degrees.world]
    count = sum(len(batch) for shard in mine for batch in writer.batches(shard, plan.sizes))
    done = 0
    with tqdm(total=count, desc="encoding", unit="sample", disable=None if shown else True) as bar:
        for encoded in writer.write(mine, samples, run.training.dataloader.num_workers):
            done += encoded
            bar.update(encoded)
            check_share(writer, run.data.max_bad_fraction, done)
    log.info("done: train with training.dataset=cache; %s names what was bad", arguments.out / BAD_SAMPLES_FILE)


def time_batch(writer: CacheWriter, samples: SamplesToEncode) -> float:
    """Seconds for one batch, once everything is warm; workers prepare batches meanwhile, so only encoding counts."""
    (first, *_) = writer.batches(0, samples.sizes)
    entries = [samples[number] for number in first]
    bad = dict(writer.bad)
    writer.encode(entries)
    started = time.perf_counter()
    writer.encode(entries)
    writer.bad = bad  # they will be counted when their turn comes
    return (time.perf_counter() - started) * writer.batch_size / len(first)


def describe(plan: Plan, out: Path, left: int, seconds: float, processes: int) -> str:
    """The bill before the work."""
    settings = plan.settings
    per_sample = plan.total_bytes / settings.samples
    bound = "at most " if settings.encoders["t5"]["mask_padding"] and "t5" in settings.parts else ""
    return (
        f"{out}: {settings.samples:,} samples x {bound}{per_sample / 1e3:,.1f} kB ({', '.join(settings.parts)}) = "
        f"{plan.total_bytes / 1e9:,.3f} GB in {settings.shard_count} shards; {left:,} samples left, about "
        f"{timedelta(seconds=round(seconds))} on {processes} process{'es' if processes > 1 else ''}"
    )


def check_room(out: Path, needed: float) -> None:
    """Raises ValueError if the disk has not that many bytes."""
    free = shutil.disk_usage(out).free
    if free < needed:
        raise ValueError(
            f"--out={str(out)!r} has {free / 1e9:,.1f} GB free, and {needed / 1e9:,.1f} GB are to be written: use "
            "another disk, --parts moments,clip, or --t5-dtype fp8"
        )


def check_share(writer: CacheWriter, max_fraction: float, done: int) -> None:
    """Raises DataError if too many samples were bad."""
    bad = sum(writer.bad.values())
    if bad > max_fraction * max(BAD_WINDOW, done):
        reasons = ", ".join(f"{number} {reason}" for reason, number in writer.bad.items() if number)
        raise DataError(
            f"{bad} of {done} samples are bad ({reasons}): data.max_bad_fraction={max_fraction:g}: mend the data, or "
            "raise data.max_bad_fraction"
        )


def main(argv: list[str], rank: int, world_size: int) -> None:
    arguments, rest = build_parser().parse_known_args(argv)
    config = load_config(rest, quiet=rank > 0)
    # Every process encodes by itself.
    config = replace(
        config, parallelism=Parallelism(data_parallel_replicate_degree=world_size, data_parallel_shard_degree=1)
    )
    layout = build_run_layout(config, world_size)
    preencode(arguments, config, layout)
    close_layout(layout)


if __name__ == "__main__":
    with recorded_exit(0, EXIT_CODES) as end:
        end.rank, world_size = read_ranks(os.environ)
        end.resumes = True  # shards appear whole, and the same command makes those that are missing
        setup_logging(end.rank)
        main(sys.argv[1:], end.rank, world_size)
