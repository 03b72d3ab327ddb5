"""How fast data is read, each figure beside what it is compared with, in one run.

    python -m benchmarks.data                 # all of it
    python -m benchmarks.data decode cache    # some: decode, cache, wait, resume

decode  JPEGs of 512 px to normalized 256 px, samples/s of one process, in turns with the plain Pillow path over
        webdataset and with the decoding of Hugging Face's datasets. Tars and tables lie in the page cache.
cache   encoded samples of FLUX.1's sizes, GB/s of one process from the page cache.
wait    share of a training step of flux-debug that waits for data, as the run itself prints it.
resume  seconds to the first batch of a data set of two billion samples, from its billionth on.

webdataset, datasets and scikit-image come with requirements-dev.txt; what is not installed is left out, and said.
"""

import argparse
import importlib.util
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flux.config import Data, DataLoader, Encoder
from flux.data.cache import FORMAT, CacheSettings, CacheSource, shard_name
from flux.data.cache_writer import CACHE_FILE, save_whole
from flux.data.dataset import OpenSource, PositionedDataset, TrainingDraws
from flux.data.decode import DecodeRules, decode_image
from flux.data.loader import Loader, PositionBatches
from flux.data.order import ShuffledOrder
from flux.data.sample import Sample, Shard
from flux.data.shapes import ShapesSource
from flux.data.shuffle import Shuffle
from flux.data.sources import build_source
from flux.data.tokenizers import build_tokenizer
from flux.data.transforms import fit_and_crop
from flux.spec import SPECS
from train import main as train

PARTS = ("decode", "cache", "wait", "resume")
PICTURES, ROUNDS = 200, 5
FROM_SIDE, TO_SIDE = 512, 256
QUALITY = 90
RULES = DecodeRules(1, 100.0, 64.0, (255, 255, 255), True)


def make_jpegs(count: int) -> list[bytes]:
    """Photographs of 512 px, cut out of scikit-image's, at different places."""
    from skimage import data

    photographs = [
        Image.fromarray(photograph()) for photograph in (data.astronaut, data.coffee, data.chelsea, data.rocket)
    ]
    jpegs = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        scale = FROM_SIDE / min(photograph.size) * (1 + number % 5 / 10)
        photograph = photograph.resize([round(side * scale) for side in photograph.size], Image.Resampling.LANCZOS)
        left, top = ((side - FROM_SIDE) * (number % 7) // 7 for side in photograph.size)
        file = io.BytesIO()
        photograph.crop((left, top, left + FROM_SIDE, top + FROM_SIDE)).save(file, "JPEG", quality=QUALITY)
        jpegs.append(file.getvalue())
    return jpegs


def write_tar(path: Path, jpegs: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, jpeg in enumerate(jpegs):
            for name, content in ((f"{number:06d}.jpg", jpeg), (f"{number:06d}.txt", f"picture {number}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def with_pillow(image: Image.Image) -> torch.Tensor:
    """The usual way: decode all of it, shrink, normalize."""
    image = image.convert("RGB").resize((TO_SIDE, TO_SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def ours(tar: Path, folder: Path) -> Callable[[], int]:
    data = Data(index_folder=str(folder / "index"), index_workers=0)
    source = build_source("webdataset", str(tar), data, TO_SIDE, "all", "training")

    def read() -> int:
        for number in range(len(source)):
            sample = source[number]
            fit_and_crop(decode_image(sample.image, RULES, (TO_SIDE, TO_SIDE)), (TO_SIDE, TO_SIDE))
        return len(source)

    return read


def of_webdataset(tar: Path, folder: Path) -> Callable[[], int]:
    import webdataset

    def read() -> int:
        count = 0
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False).decode("pil"):
            with_pillow(sample["jpg"])
            count += 1
        return count

    return read


def of_datasets(tar: Path, folder: Path) -> Callable[[], int]:
    import datasets

    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": jpeg, "path": None} for jpeg in read_members(tar)]},
        features=datasets.Features({"image": datasets.Image()}),
    )

    def read() -> int:
        for row in table:
            with_pillow(row["image"])
        return len(table)

    return read


def read_members(tar: Path) -> Iterator[bytes]:
    with tarfile.open(tar) as members:
        for member in members:
            if member.name.endswith(".jpg"):
                file = members.extractfile(member)
                assert file is not None
                yield file.read()


READERS = {"this recipe": ours, "webdataset": of_webdataset, "datasets": of_datasets}


def measure_decode(folder: Path) -> None:
    missing = [name for name in ("skimage", "webdataset", "datasets") if importlib.util.find_spec(name) is None]
    if "skimage" in missing:
        print("decode: left out, scikit-image with its photographs is not installed")
        return
    write_tar(folder / "photographs.tar", make_jpegs(PICTURES))
    readers = {
        name: build(folder / "photographs.tar", folder) for name, build in READERS.items() if name not in missing
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(ROUNDS + 1):  # the first one warms up
        for name, read in readers.items():
            started = time.process_time()
            count = read()
            if turn:
                rates[name].append(count / (time.process_time() - started))
    print(f"decode: {FROM_SIDE} px JPEGs (quality {QUALITY}) to {TO_SIDE} px, samples per second of one core")
    for name in readers:
        ratio = statistics.median(mine / rate for mine, rate in zip(rates["this recipe"], rates[name], strict=True))
        print(f"  {name:12} {statistics.median(rates[name]):7.0f}   this recipe is {ratio:.2f} times as fast")
    for name in missing:
        print(f"  {name} is not installed and left out")


def measure_cache(folder: Path, samples: int = 512, shards: int = 4) -> None:
    """Random access in a cache of 256 px and 256 text tokens in bfloat16."""
    shape = {"moments": (32, 32, 32), "t5": (256, 4096), "clip": (768,)}
    per_shard = samples // shards
    encoders = {part: {"dtype": "bfloat16"} for part in ("autoencoder", "t5", "clip")}
    settings = CacheSettings(FORMAT, samples, per_shard, list(shape), "bfloat16", encoders, {}, [])
    (folder / CACHE_FILE).write_text(json.dumps(settings._asdict()))
    empty = torch.zeros(0, dtype=torch.uint8), torch.zeros(per_shard + 1, dtype=torch.int64)
    for number in range(shards):
        tensors = {
            "moments": torch.randn(per_shard * 32**3).bfloat16(),
            "moments_start": torch.arange(per_shard + 1) * 32**3,
            "t5": torch.randn(per_shard * 256, 4096).bfloat16(),
            "t5_start": torch.arange(per_shard + 1) * 256,
            "clip": torch.randn(per_shard, 768).bfloat16(),
            "size": torch.full((per_shard, 2), 256, dtype=torch.int32),
            "reason": torch.zeros(per_shard, dtype=torch.uint8),
            **dict(zip(("caption", "caption_start"), empty, strict=True)),
            **dict(zip(("key", "key_start"), (one.clone() for one in empty), strict=True)),
        }
        save_whole(tensors, folder / shard_name(number))
    source = CacheSource(str(folder), "training.dataset_path", encoders)
    rates = []
    for _ in range(ROUNDS + 1):
        order = torch.randperm(samples).tolist()
        started, size = time.perf_counter(), 0
        for start in range(0, samples, 8):  # stacked to batches of 8, as training does
            batch = [source[number] for number in order[start : start + 8]]
            for parts in zip(*[(one.moments_CHW, one.t5_LE, one.pooled_V) for one in batch], strict=True):
                size += torch.stack(parts).nbytes
        rates.append(size / (time.perf_counter() - started) / 1e9)
    print(f"cache: {statistics.median(rates[1:]):.2f} GB/s, {size / samples / 1e6:.3f} MB per sample, in batches of 8")


def measure_wait(folder: Path, steps: int = 6) -> None:
    """From tars of photographs, with one worker."""
    if importlib.util.find_spec("skimage") is None:
        print("wait: left out, scikit-image with its photographs is not installed")
        return
    write_tar(folder / "photographs.tar", make_jpegs(PICTURES))
    options = {
        "job.config_file": "train_configs/flux_debug.toml",
        "job.dump_folder": folder / "run",
        "training.dataset": "webdataset",
        "training.dataset_path": folder / "photographs.tar",
        "training.steps": steps,
        "training.local_batch_size": 2,
        "training.dataloader.num_workers": 1,
        "training.test_mode": "true",
        "data.index_folder": folder / "index",
        "metrics.log_freq": 1,
        "validation.enable": "false",
    }
    train([f"--{name}={value}" for name, value in options.items()])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait_percent"] for line in lines if "loss" in line][2:]  # the worker has started by then
    print(f"wait: {statistics.median(waits):.3f} % of a step of flux-debug, at most {max(waits):.3f} %")


class _Billions(ShapesSource):
    """Two billion pictures of shapes."""

    @property
    def shards(self) -> list[Shard]:
        return [Shard("shapes", 0, len(self))]

    def __len__(self) -> int:
        return 2 * 10**9

    def __getitem__(self, index: int) -> Sample:
        return super().__getitem__(index)


def measure_resume(folder: Path) -> None:
    tokenizer = build_tokenizer(Encoder(), test_mode=False)
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        source = _Billions("train", 64)
        order = ShuffledOrder([Shuffle([len(source)], 0, 0, "train")], None, (64, 64), 32, 0)
        draws = TrainingDraws(seed=0)
        dataset = PositionedDataset([OpenSource(source, RULES)], order, tokenizer, SPECS["flux-tiny"], draws)
        batches = PositionBatches(32, cursor=10**9 - 10**9 % 32, update_samples=order.update_samples)
        raw = next(iter(Loader(dataset, batches, DataLoader(num_workers=1))))
        seconds.append(time.perf_counter() - started)
        assert raw.position_B[0] > 10**9 - 32
    print(f"resume: the first batch of 32 after {10**9:,} samples comes in {statistics.median(seconds):.2f} s")


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(parts: Iterable[str]) -> None:
    torch.set_num_threads(1)
    measures = {"decode": measure_decode, "cache": measure_cache, "wait": measure_wait, "resume": measure_resume}
    for part in parts:
        with scratch() as folder:
            measures[part](folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=PARTS, help="what is measured (all)")
    main(parser.parse_args().parts)
