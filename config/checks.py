"""Rules between keys, on a whole JobConfig. What a single key may be stands beside it, in its section's dataclass."""

from collections.abc import Iterator
from pathlib import PurePath

from config.checkpoint_checks import find_checkpoint_doubts, find_checkpoint_faults
from config.data_checks import find_data_doubts, find_data_faults
from config.job_config import JobConfig
from config.keys import show
from config.layout_checks import Finding, find_layout_faults, find_technique_faults
from flux.config import DataLoader
from flux.spec import PIXELS_PER_TOKEN, SPECS

BFLOAT16_BETA2 = 0.99  # of 1 % a step; bfloat16 rounds to 0.8 %, and of 0.1 % nothing is left


def find_faults(config: JobConfig, world_size: int | None) -> Iterator[Finding]:
    """Combinations that cannot be trained as they stand, on `world_size` processes if that is known."""
    yield from _picture_size(config)
    yield from find_layout_faults(config, world_size)
    yield from find_technique_faults(config)
    yield from find_data_faults(config)
    yield from _loader("training.dataloader", config.training.dataloader)
    yield from _loader("validation.dataloader", config.validation.dataloader)
    yield from _number_formats(config)
    yield from _profiled_steps(config)
    yield from _folders(config)
    yield from find_checkpoint_faults(config, world_size)


def find_doubts(config: JobConfig) -> Iterator[str]:
    """Combinations that train, but probably not as meant: each is a warning."""
    yield from _learning_rate(config)
    yield from _optimizer_formats(config)
    yield from find_checkpoint_doubts(config)
    yield from find_data_doubts(config)
    training, validation = config.training, config.validation
    parallelism, attention = config.parallelism, config.model.attention_backend
    is_ring = parallelism.context_parallel_degree > 1 and parallelism.context_parallel_method == "ring"
    if attention != "auto" and is_ring:
        yield (
            f'model.attention_backend="{attention}" has no effect with parallelism.context_parallel_method="ring", '
            "which has a kernel of its own"
        )
    if config.compile.enable and not config.compile.components:
        yield "compile.enable=true compiles nothing, since compile.components is empty: name model, loss or both"
    if training.guidance != 1.0 and not SPECS[config.model.flavor].transformer.guidance_embed:
        yield f"training.guidance={training.guidance:g} has no effect: {config.model.flavor} embeds no guidance"
    if validation.enable and validation.enable_classifier_free_guidance and not training.classifier_free_guidance_prob:
        yield (
            "validation.enable_classifier_free_guidance=true needs a model that knows the empty prompt, "
            "which training.classifier_free_guidance_prob=0 never shows it: use 0.1, or switch the guidance off"
        )


def _picture_size(config: JobConfig) -> Iterator[Finding]:
    for name, size in (
        ("training.img_size", config.training.img_size),
        ("inference.img_size", config.inference.img_size),
    ):
        if size > 0 and size % PIXELS_PER_TOKEN:
            below = size - size % PIXELS_PER_TOKEN
            choices = f"use {below} or {below + PIXELS_PER_TOKEN}"
            yield (name,), f"{name}={size} must be a multiple of {PIXELS_PER_TOKEN}: {choices}"


def _loader(section: str, loader: DataLoader) -> Iterator[Finding]:
    if loader.num_workers:
        return
    for name, is_set in (
        ("prefetch_factor", loader.prefetch_factor is not None),
        ("persistent_workers", loader.persistent_workers),
    ):
        if is_set:
            yield (
                (f"{section}.{name}", f"{section}.num_workers"),
                f"{section}.{name} is about workers, and {section}.num_workers=0 starts none: "
                f"set num_workers to at least 1, or leave {name} out",
            )


def _number_formats(config: JobConfig) -> Iterator[Finding]:
    training = config.training
    if training.dtype == "bfloat16" and training.mixed_precision_param == "float32":
        yield (
            ("training.dtype", "training.mixed_precision_param"),
            'training.dtype="bfloat16" with training.mixed_precision_param="float32" rounds the weights and then '
            "computes with them in full, the time of one and the precision of the other: "
            'set training.dtype="float32", or both to "bfloat16"',
        )


def _profiled_steps(config: JobConfig) -> Iterator[Finding]:
    section = config.profiling
    steps = section.profiler_warmup + section.profiler_active
    if section.enable_profiling and steps > section.profile_freq:
        yield (
            ("profiling.profile_freq", "profiling.profiler_warmup", "profiling.profiler_active"),
            f"profiling.profile_freq={section.profile_freq} must be at least {steps}, the steps of "
            f"profiler_warmup={section.profiler_warmup} and profiler_active={section.profiler_active}: "
            f"use {steps} or more, or shorten these",
        )


def _learning_rate(config: JobConfig) -> Iterator[str]:
    """What training/lr_schedule.py does with steps that do not add up, said before it does it."""
    schedule, steps = config.lr_scheduler, config.training.steps
    total, warmup, ratio = schedule.total_steps or steps, schedule.warmup_steps, schedule.decay_ratio
    if warmup > total:
        yield (
            f"lr_scheduler.warmup_steps={warmup} is longer than the schedule of {total} steps: "
            f"the warm-up is shortened to {total}"
        )
    elif ratio is not None and warmup + round(ratio * total) > total:
        yield (
            f"lr_scheduler.warmup_steps={warmup} and decay_ratio={ratio:g} of {total} steps overlap: "
            f"the decay is shortened to the {total - warmup} steps after the warm-up"
        )
    if total < steps and ratio != 0:
        yield (
            f"lr_scheduler.total_steps={total} ends before training.steps={steps}: "
            f"the rest runs at {schedule.min_lr_factor:g} of optimizer.lr"
        )
    if steps < warmup <= total:
        yield (
            f"training.steps={steps} ends within lr_scheduler.warmup_steps={warmup}: "
            "the learning rate never reaches optimizer.lr"
        )


def _optimizer_formats(config: JobConfig) -> Iterator[str]:
    section = config.optimizer
    if section.bf16_rounding != "remainder" and config.training.dtype == "float32":
        yield (
            f'optimizer.bf16_rounding={show(section.bf16_rounding)} has no effect: training.dtype="float32" keeps all '
            "digits of the weights"
        )
    if section.state_dtype == "bfloat16" and section.beta2 > BFLOAT16_BETA2:
        yield (
            f"optimizer.beta2={section.beta2:g} lets a mean of squares fall by less in a step than "
            'optimizer.state_dtype="bfloat16" can tell, so it would hardly fall: '
            f'use {BFLOAT16_BETA2:g} or less, or "8bit" or "float32"'
        )


def _folders(config: JobConfig) -> Iterator[Finding]:
    """What a run writes stays in its folder."""
    for name, folder in (
        ("metrics.save_tb_folder", config.metrics.save_tb_folder),
        ("validation.save_img_folder", config.validation.save_img_folder),
        ("profiling.save_traces_folder", config.profiling.save_traces_folder),
        ("profiling.save_memory_snapshot_folder", config.profiling.save_memory_snapshot_folder),
    ):
        path = PurePath(folder)
        if path.is_absolute() or ".." in path.parts:
            yield (
                (name,),
                f"{name}={show(folder)} must stay inside the run folder: give a plain name",
            )
