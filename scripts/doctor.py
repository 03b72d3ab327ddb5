"""Looks at this machine, before a run or after one has failed: what is there, what is missing, and what mends it.

    python -m scripts.doctor                                                   # for the tiny run
    python -m scripts.doctor --job.config_file train_configs/flux_dev.toml     # for a run: its model, folder, precision

Every line is ok, warning or error. Nothing is changed and the network is not asked. Exit code 0: nothing stands in the
way. 1: an error does. 2: the configuration is wrong.
"""

import argparse
import importlib.util
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from config.job_config import JobConfig
from config.parse import ConfigError, parse, read_process_count
from runtime import exit_codes
from runtime.hardware import usable_cores
from runtime.preflight import Finding, nearest_folder
from runtime.requirements import OLDEST_PYTHON, check_requirement, read_requirements, release

ROOT = Path(__file__).parents[1]
TINY_RUN = ROOT / "train_configs" / "flux_tiny.toml"
GIB = 2**30

# First diffusers release that can open what is exported, or will be.
PIPELINES = {"FLUX.1": "0.30.0", "Qwen-Image": "0.35.0", "FLUX.2": "0.36.0", "FLUX.2 klein": "0.37.0"}
# NVIDIA driver that a major version of CUDA asks for, on Linux.
OLDEST_DRIVER = {"12": "525.60", "13": "580.65"}
# Data workers hand batches over in shared memory: a GB holds the prefetched batches of eight workers at 512 px.
LEAST_SHARED_MEMORY = 1 * GIB
# A data worker keeps shards open, 32 of a cache, and every batch on its way takes descriptors too.
LEAST_OPEN_FILES = 4096
# File systems that other machines see too; others are taken for this machine's own.
SHARED_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "glusterfs", "orangefs", "9p", "fuse")
MOUNTS = Path("/proc/self/mounts")
SHARED_MEMORY = Path("/dev/shm")


class Case(NamedTuple):
    """What is looked at: a run on this machine."""

    config: JobConfig
    world_size: int | None  # None: as many processes as there are GPUs

    @property
    def folder(self) -> Path:
        """The run folder, or what there is of the way to it."""
        return nearest_folder(self.config.job.dump_folder)


def find_python(case: Case) -> Iterator[Finding]:
    text = f"{platform.python_version()}, {sys.executable}"
    fix = f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or newer; run_train.sh takes it from there"
    yield Finding("error", "Python", text, fix) if sys.version_info < OLDEST_PYTHON else Finding("ok", "Python", text)


def find_packages(case: Case) -> Iterator[Finding]:
    """Those that training needs, a line each."""
    for requirement in read_requirements(ROOT / "requirements.txt"):
        fault = check_requirement(requirement)
        if fault is None:
            yield Finding("ok", requirement.name, version(requirement.name))
        else:
            pinned = f"{requirement.name}=={'.'.join(map(str, requirement.pin))}"
            yield Finding("error", requirement.name, fault, f"{sys.executable} -m pip install {pinned}")


def find_diffusers(case: Case) -> Iterator[Finding]:
    """What an installed diffusers can open of the FLUX families."""
    try:
        text = version("diffusers")
    except PackageNotFoundError:
        yield Finding("ok", "diffusers", "not installed: only who opens an exported pipeline, or tests, needs it")
        return
    opens = [name for name, oldest in PIPELINES.items() if release(text) >= release(oldest)]
    lacking = [name for name in PIPELINES if name not in opens]
    if "FLUX.1" in lacking:
        fix = f"pip install 'diffusers>={PIPELINES['FLUX.1']}'"
        yield Finding("warning", "diffusers", f"{text} cannot open FLUX.1 pipelines, which runs export", fix)
    else:
        later = f"; {', '.join(f'{name} needs {PIPELINES[name]}' for name in lacking)}" if lacking else ""
        yield Finding("ok", "diffusers", f"{text} opens pipelines of {', '.join(opens)}{later}")


def find_torchao(case: Case) -> Iterator[Finding]:
    """Is there what model.converters and optimizer.state_dtype ask for?"""
    from parallel.quantize import check_converters
    from training.optimizer import check_optimizer

    users = case.config.model.converters + ["8-bit states"] * (case.config.optimizer.state_dtype == "8bit")
    try:
        check_converters(case.config.model.converters, case.config.quantize, _device_type())
        check_optimizer(case.config.optimizer)
    except ValueError as error:
        found, _, fix = str(error).partition(": ")
        yield Finding("error", "torchao", found, fix)
        return
    installed = importlib.util.find_spec("torchao") is not None
    text = version("torchao") if installed else "not installed: only 8-bit products and states need it"
    yield Finding("ok", "torchao", f"{text}, for {', '.join(users)}" if users else text)


def find_accelerator(case: Case) -> Iterator[Finding]:
    """GPUs, CUDA, driver and NCCL."""
    import torch

    driver = _ask_nvidia("driver_version")
    if not torch.cuda.is_available():
        if not driver:
            yield Finding("ok", "GPU", f"none: torch {torch.__version__} computes on {usable_cores()} CPU cores")
        elif torch.version.cuda is None:
            fix = "install the CUDA build of the same version of torch"
            yield Finding("error", "GPU", f"there is one, and torch {torch.__version__} is built for CPUs", fix)
        else:
            oldest = OLDEST_DRIVER.get(torch.version.cuda.partition(".")[0], "of its own time")
            fix = f"CUDA {torch.version.cuda} needs driver {oldest} or newer"
            yield Finding("error", "GPU", f"there is one, and torch cannot use it with driver {driver[0]}", fix)
        return
    count = torch.cuda.device_count()
    for number in range(count):
        gpu = torch.cuda.get_device_properties(number)
        text = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        yield Finding("ok", f"GPU {number}", text)
    if case.world_size is not None and case.world_size > count:
        text = f"NGPU={case.world_size} processes and {count} GPUs on this machine"
        yield Finding("error", "GPU", text, f"set NGPU={count}")
    cuda = torch.version.cuda or "unknown"
    yield Finding("ok", "CUDA", f"{cuda}, driver {driver[0] if driver else 'unknown'}")
    if torch.distributed.is_nccl_available():
        yield Finding("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("error", "NCCL", "this torch has none", "install the CUDA build of torch for Linux")


def find_attention(case: Case) -> Iterator[Finding]:
    """The kernels of scaled_dot_product_attention that can serve here, and FlashAttention's own packages."""
    import torch

    packages = [name for name in ("flash_attn_interface", "flash_attn") if importlib.util.find_spec(name)]
    extra = f"; installed beside it: {', '.join(packages)}" if packages else ""
    if _device_type() == "cpu":
        yield Finding("ok", "attention", f"torch's fused kernel for CPUs{extra}")
        return
    backends = torch.backends.cuda
    kernels = {
        "cuDNN": backends.cudnn_sdp_enabled() and torch.backends.cudnn.is_available(),
        "FlashAttention": backends.flash_sdp_enabled() and backends.is_flash_attention_available(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
    }
    usable = [name for name, there in kernels.items() if there]
    if torch.cuda.get_device_capability() < (8, 0):
        usable = [name for name in usable if name == "memory-efficient"]
    if usable:
        yield Finding("ok", "attention", f"{', '.join(usable)}{extra}")
    else:
        fix = "install the CUDA build of torch as it is published"
        yield Finding("warning", "attention", "no fused kernel: memory grows with the square of the tokens", fix)


def find_compiler(case: Case) -> Iterator[Finding]:
    """Asked for by compile.enable; otherwise only told."""
    from parallel.compile import check_compiler

    section = case.config.compile
    try:
        check_compiler(replace(section, enable=True), _device_type())
    except ValueError as error:
        found, _, fix = str(error).partition(": ")
        yield Finding("error" if section.enable else "warning", "compiler", found, fix)
        return
    yield Finding("ok", "compiler", f"compile.backend={section.backend} has what it needs")


def find_shared_memory(case: Case) -> Iterator[Finding]:
    if not SHARED_MEMORY.is_dir():
        yield Finding("ok", "shared memory", f"this system has no {SHARED_MEMORY}")
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    text = f"{free / GIB:.1f} GiB free in {SHARED_MEMORY}"
    workers = case.config.training.dataloader.num_workers
    if free >= LEAST_SHARED_MEMORY or not workers:
        yield Finding("ok", "shared memory", text)
    else:
        fix = "start the container with --shm-size=8g (or --ipc=host), or set training.dataloader.num_workers=0"
        yield Finding("warning", "shared memory", f"{text}, through which {workers} data workers pass batches", fix)


def find_file_limit(case: Case) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} in a process"
    if soft == resource.RLIM_INFINITY or soft >= LEAST_OPEN_FILES:
        yield Finding("ok", "open files", text)
        return
    fix = "ulimit -n 65536" if hard == resource.RLIM_INFINITY or hard >= 65536 else "raise nofile in limits.conf"
    yield Finding("warning", "open files", f"{text}, which many shards and data workers can use up", fix)


def find_file_system(case: Case) -> Iterator[Finding]:
    """Do other machines see the run folder?"""
    wanted, kind = case.config.job.dump_folder, _file_system(case.folder)
    if kind.startswith(SHARED_FILE_SYSTEMS):
        yield Finding("ok", "file system", f"{wanted} is on {kind}, which other machines can see too")
    elif case.world_size is not None and case.world_size > max(1, _gpu_count()) > 1:
        fix = "set job.dump_folder to a folder that all machines share, such as one on NFS or Lustre"
        yield Finding("warning", "file system", f"{wanted} is on {kind}, which other machines do not see", fix)
    else:
        text = f"{wanted} is on {kind}, this machine's own; several machines need a shared one"
        yield Finding("ok", "file system", text)


def find_for_run(case: Case) -> Iterator[Finding]:
    """What a run itself looks at before it begins."""
    from preflight import CHECKS

    for check in CHECKS:
        yield from check(case.config)


def find_hub_login(case: Case) -> Iterator[Finding]:
    from huggingface_hub import get_token

    if get_token():
        yield Finding("ok", "Hugging Face", "a token is stored (whether it is valid, only the hub can tell)")
    else:
        text = "no token: only gated repositories ask for one, such as black-forest-labs/FLUX.1-dev (`hf auth login`)"
        yield Finding("ok", "Hugging Face", text)


CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    find_python,
    find_packages,
    find_diffusers,
    find_torchao,
    find_accelerator,
    find_attention,
    find_compiler,
    find_for_run,
    find_shared_memory,
    find_file_limit,
    find_file_system,
    find_hub_login,
)


def examine(case: Case) -> list[Finding]:
    """Every check; one that fails itself, for want of a package say, is a warning and no end."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(case)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            findings.append(Finding("warning", check.__name__.removeprefix("find_"), f"cannot be told ({reason})"))
    return findings


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def _ask_nvidia(field: str) -> list[str]:
    """What nvidia-smi says of every GPU; nothing where there is none."""
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def _file_system(place: Path) -> str:
    """Kind of the file system that a folder is on."""
    if not MOUNTS.exists():
        return "an unknown file system"
    mounts = [line.split() for line in MOUNTS.read_text().splitlines()]
    # NOTE: spaces of a mount point are written as \040; the last of equal ones covers those before it.
    points = [(Path(point.replace("\\040", " ")), kind) for _, point, kind, *_ in mounts]
    _, kind = max(
        ((len(point.parts), number), kind)
        for number, (point, kind) in enumerate(points)
        if place.resolve().is_relative_to(point)
    )
    return kind


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.doctor",
        usage="%(prog)s [--job.config_file FILE] [--section.key value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _, options = parser.parse_known_args(argv)
    try:
        world_size = read_process_count(os.environ)
        config, _ = parse(["--job.config_file", str(TINY_RUN), *options], world_size)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return exit_codes.CONFIG
    findings = examine(Case(config, world_size))
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.level:<8} {finding.name:<{width}}  {finding.found}")
        if finding.fix:
            print(f"{'':<8} {'':<{width}}  -> {finding.fix}")
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    print(", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items()))
    return exit_codes.ERROR if counts["error"] else exit_codes.OK


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
