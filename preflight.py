"""What is looked at before a run is built: alone, before the ranks meet, and together, right after.

A mistake that would end the run minutes later, when encoders and model have been built, or at its first checkpoint, is
said at once.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from build import DTYPES, check_machine, name_autoencoder, read_versions
from checkpoint.steps import most_at_once
from config.job_config import JobConfig
from estimate import is_stored, optimizer_bytes, parameter_count
from flux.autoencoder import open_autoencoder
from flux.clip_score import load_clip_scorer
from flux.conditioner import load_clip, load_t5
from flux.prompts import load_prompts
from flux.spec import SPECS
from flux.text_folders import resolve_clip, resolve_t5
from memory_advice import check_memory
from parallel.axes import check_axes
from parallel.degrees import Degrees
from parallel.mesh import Layout
from runtime.preflight import (
    SEEN_SECONDS,
    Finding,
    Probe,
    Report,
    Sight,
    describe_versions,
    find_other_clocks,
    find_other_versions,
    find_unshared,
    gather_problems,
    may_write,
    nearest_folder,
)
from runtime.run_lock import this_machine

GIB = 2**30

log = logging.getLogger("train")


def find_folder(config: JobConfig) -> Iterator[Finding]:
    """May the run folder be written?"""
    wanted, place = config.job.dump_folder, nearest_folder(config.job.dump_folder)
    if may_write(place):
        yield Finding("ok", "run folder", f"{wanted} can be written")
    else:
        fix = "set job.dump_folder to a folder that you may write"
        yield Finding("error", "run folder", f"job.dump_folder={wanted!r}: {place} cannot be written", fix)


def find_disk(config: JobConfig) -> Iterator[Finding]:
    """Free room against what the run will save, beside what it has saved already."""
    section, folder = config.checkpoint, Path(config.job.dump_folder)
    needed, least, what = saved_bytes(config)
    free = shutil.disk_usage(nearest_folder(folder)).free
    text = f"{free / GIB:,.1f} GiB free; {what}"
    if needed > free:
        saved = _size(folder / section.folder)
        needed, least = needed - saved, least - saved
    if needed <= free:
        yield Finding("ok", "disk", text)
    elif least <= free:
        fix = "carry older checkpoints away in time, or lower checkpoint.keep_latest_k"
        yield Finding("warning", "disk", text, fix)
    else:
        fix = "lower checkpoint.keep_latest_k, or set job.dump_folder to a larger disk"
        yield Finding("error" if section.enable else "warning", "disk", text, fix)


def _size(folder: Path) -> int:
    """Bytes in all files of a folder; what another process takes away meanwhile does not count."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def saved_bytes(config: JobConfig) -> tuple[int, int, str]:
    """What a run will have on disk at most, as much of it as nobody can carry away meanwhile, and how that comes
    about.
    """
    section, parameters, steps = config.checkpoint, parameter_count(config), config.training.steps
    export = parameters * DTYPES[section.export_dtype].itemsize
    exports = export * (1 + config.ema.enable + section.last_save_in_hf)
    if not section.enable:
        return exports, exports, f"the weights at the end take {exports / GIB:,.2f} GiB"
    # Weights with their remainders, the optimizer's running means, and the average of the weights in fp32.
    one = parameters * (DTYPES[config.training.dtype].itemsize + (4 if config.ema.enable else 0))
    one += optimizer_bytes(config, Degrees())
    candidates = sorted({1, steps, *range(section.interval, steps + 1, section.interval)})
    saved = [step for step in candidates if section.is_due(step, step == steps)]
    kept = most_at_once(saved, section.keep_latest_k, section.keep_every)
    staying = most_at_once(saved, section.keep_latest_k or 1, 0)
    end = exports * section.last_save_model_only
    total = kept * one + end
    what = f"{kept} checkpoints of {one / GIB:,.2f} GiB and the weights at the end take {total / GIB:,.1f} GiB"
    return total, staying * one + end, what


def find_encoders(config: JobConfig) -> Iterator[Finding]:
    """Are the encoders there, and of the kind and width that the model needs? No weight is read, nothing fetched."""
    section, spec = config.encoder, SPECS[config.model.flavor]
    transformer, dtype = spec.transformer, DTYPES[section.dtype]
    if is_stored(config) and not _draws(config):
        yield Finding("ok", "encoders", "the data set says which of them it needs")
        return

    def t5() -> str:
        folder = resolve_t5(section.t5_encoder).weights
        load_t5(folder, transformer, dtype, "meta")
        return str(folder)

    def clip() -> str:
        folder = resolve_clip(section.clip_encoder).weights
        load_clip(folder, transformer, dtype, "meta")
        return str(folder)

    if config.training.test_mode:
        yield Finding("ok", "encoders", "training.test_mode: tiny ones of text, which come with the recipe")
    else:
        yield _attempt("encoders", t5)
        yield _attempt("encoders", clip)
    yield _attempt("encoders", lambda: open_autoencoder(section.autoencoder_path, spec.codec, name_autoencoder).path)


def find_validation(config: JobConfig) -> Iterator[Finding]:
    """Is there what pictures are drawn from and scored by?"""
    path, scorer = config.validation.prompts_path, config.validation.clip_score_path
    if _draws(config) and path:
        yield _attempt("prompts", lambda: f"{len(load_prompts(path, 'validation.prompts_path'))} in {path}")
    if _draws(config) and scorer:
        yield _attempt("CLIP score", lambda: load_clip_scorer(scorer, "meta") and scorer)


CHECKS: tuple[Callable[[JobConfig], Iterator[Finding]], ...] = (find_folder, find_disk, find_encoders, find_validation)


def _draws(config: JobConfig) -> bool:
    return config.validation.enable and config.validation.eval_freq > 0


def _attempt(name: str, look: Callable[[], object]) -> Finding:
    """What a look finds, in words, or the error with its remedy."""
    try:
        return Finding("ok", name, str(look()))
    except ValueError as error:
        found, _, fix = str(error).rpartition(": ")
        return Finding("error", name, found, fix)
    except OSError as error:
        return Finding("error", name, f"{error.filename} cannot be read ({error.strerror})", "let this user read it")


def look_alone(config: JobConfig, environment: Mapping[str, str]) -> list[str]:
    """What stands in the way of a run on this machine, one line each. Its first process looks; others find nothing.

    Args:
        environment: LOCAL_RANK tells which process this is; without it there is one.
    """
    if environment.get("LOCAL_RANK", "0") != "0":
        return []
    findings = [finding for check in CHECKS for finding in check(config)]
    for finding in findings:
        if finding.level == "warning":
            log.warning("%s", finding.describe())
    return [finding.describe() for finding in findings if finding.level == "error"]


def check_run(config: JobConfig, layout: Layout, problems: list[str]) -> None:
    """Everything that can be known before a run is built. All ranks must call it.

    Args:
        problems: what `look_alone` has found on this rank.

    Raises:
        ValueError, RuntimeError: on all ranks; see `check_machine`, `check_memory` and `check_together`.
    """
    check_machine(config, layout.device.type)
    check_memory(config, layout)
    check_together(config, layout, problems)


def check_together(config: JobConfig, layout: Layout, problems: list[str]) -> None:
    """Compares what the ranks find, and tries how they reach each other. All ranks must call it.

    Args:
        problems: what `look_alone` has found on this rank.

    Raises:
        ValueError: on all ranks, with a line for everything that is wrong: a problem of a machine, other versions, a
            run folder that is not shared.
        RuntimeError: on all ranks that can be reached, an axis along which they do not reach each other.
    """
    reports = _gather_reports(layout, problems)
    verdict = "\n".join(problems) if layout.degrees.world == 1 else _look_together(config, layout, reports)
    if verdict:
        raise ValueError(verdict)
    check_axes(layout, [report.host for report in reports])
    log.info("versions: %s", describe_versions(read_versions()))


def _gather_reports(layout: Layout, problems: list[str]) -> list[Report]:
    """Of all ranks, on rank 0; nothing on the others."""
    machine = this_machine()
    own = Report(machine["host"], machine["boot"], problems, read_versions())
    return [Report(*json.loads(text)) for text in layout.gather_texts("preflight/reports", json.dumps(own))]


def _look_together(config: JobConfig, layout: Layout, reports: list[Report]) -> str:
    """What is wrong, on every rank; empty: nothing is."""
    probe = Probe(config.job.dump_folder)
    try:
        # All ranks wait for this word, so that they read their clocks at the same moment.
        told = layout.from_rank_0("preflight/probe", probe.write)
        now = time.time()
        own = Sight(now, *probe.look(told, SEEN_SECONDS))
        sights = [Sight(*json.loads(text)) for text in layout.gather_texts("preflight/sights", json.dumps(own))]
    finally:
        probe.remove()
    return layout.from_rank_0("preflight/verdict", lambda: _judge(config.job.dump_folder, probe, reports, sights))


def _judge(folder: str, probe: Probe, reports: list[Report], sights: list[Sight]) -> str:
    """A line for everything that is wrong."""
    for text in find_other_clocks(reports, sights):
        log.warning("%s", text)
    unshared = [str(probe.fault)] if probe.fault else find_unshared(folder, reports, sights)
    return "\n".join([*gather_problems(reports), *find_other_versions(reports), *unshared])
