"""What a run that goes on from a checkpoint makes of its configuration."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from config.job_config import JobConfig
from config.keys import KEYS, show
from config.parse import build_config
from redact import redact_values

# Sections and keys that change where and how a run computes, saves and tells, but not what it computes.
_NEUTRAL = (
    *("job.", "metrics.", "validation.", "inference.", "parallelism.", "activation_checkpoint.", "compile.", "comm."),
    *("checkpoint.", "training.dataloader.", "training.local_batch_size", "training.enable_cpu_offload", "debug."),
    *(
        "profiling.",
        "reliability.stop",
        "reliability.watchdog",
        "reliability.step",
        "reliability.phase",
        "optimizer.implementation",
        "model.attention_backend",
    ),
    *("encoder.cpu_offload", "encoder.encode_ahead"),
    *("data.index_folder", "data.index_workers", "data.shard_cache", "data.on_bad_shard", "data.max_bad_fraction"),
    "data.worker_timeout_seconds",
)


def settle_seed(config: JobConfig, saved: int | None, draw: Callable[[], int]) -> JobConfig:
    """The configuration with the seed of the checkpoint, else with its own, else with a drawn one.

    Raises:
        ValueError: it names another seed than the checkpoint's.
    """
    seed = config.debug.seed
    if saved is not None and seed not in (None, saved):
        raise ValueError(
            f"debug.seed={seed} is not the seed of the checkpoint: leave it out, or set debug.seed={saved}"
        )
    settled = saved if saved is not None else seed if seed is not None else draw()
    return replace(config, debug=replace(config.debug, seed=settled))


def restore_config(saved: Mapping[str, Any], where: str) -> JobConfig:
    """The configuration that a checkpoint was saved with; a key that it does not have yet gets its default.

    Args:
        saved: the sections, as `dataclasses.asdict` makes them.
        where: how a message calls the checkpoint.

    Raises:
        ValueError: it has a key that is unknown, or a value that does not fit.
    """
    values = dict(_flatten(saved)) if isinstance(saved, Mapping) else {"config": saved}
    if unknown := [name for name in values if name not in KEYS]:
        raise ValueError(f"{where} was saved with the unknown key {unknown[0]}: use the recipe that has written it")
    try:
        return build_config(JobConfig, "", {name: KEYS[name].checked(value) for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{where} was saved with a configuration that does not fit: {error}") from None


def find_changes(saved: Mapping[str, Any], config: JobConfig, update_size: int) -> list[str]:
    """One text per setting that means other numbers than before, such as `optimizer.lr 0.001 -> 0.0005`.

    Args:
        saved: what a checkpoint knows beside its tensors: "config" with its sections, and "update_size".
        update_size: samples per update now.
    """
    # Saved without its secrets: another signature is no other data.
    before, now = (dict(_flatten(redact_values(values))) for values in (saved.get("config", {}), asdict(config)))
    names = [name for name in now if name in before and not name.startswith(_NEUTRAL)]
    changes = [f"{name} {show(before[name])} -> {show(now[name])}" for name in names if before[name] != now[name]]
    if (size := saved.get("update_size", update_size)) != update_size:
        changes.append(f"samples per update {size} -> {update_size} (training.global_batch_size keeps them)")
    return changes


def find_version_changes(saved: Mapping[str, Any], versions: Mapping[str, str]) -> list[str]:
    """One text per version that is not the one of then, such as `torch 2.12.0 -> 2.13.0`.

    Args:
        saved: what a checkpoint knows beside its tensors: "versions".
        versions: of now, by name.
    """
    before = saved.get("versions", {})
    return [f"{name} {before[name]} -> {now}" for name, now in versions.items() if before.get(name, now) != now]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value
