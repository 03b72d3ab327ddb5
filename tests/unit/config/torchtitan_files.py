"""What torchtitan v0.2's three FLUX files say: key -> its value in debug, dev and schnell; None: not there."""

import json

_NAMES = ("debug", "dev", "schnell")
_VALUES = {
    "job.dump_folder": ("./outputs",) * 3,
    "job.description": ("Flux debug model", "Flux-dev model", "Flux-schnell model"),
    "job.print_config": (False, None, None),
    "job.custom_config_module": ("torchtitan.models.flux.job_config",) * 3,
    "profiling.enable_profiling": (False,) * 3,
    "profiling.save_traces_folder": ("profile_trace",) * 3,
    "profiling.profile_freq": (10, 10, 100),
    "profiling.enable_memory_snapshot": (False,) * 3,
    "profiling.save_memory_snapshot_folder": ("memory_snapshot",) * 3,
    "metrics.log_freq": (1, 100, 100),
    "metrics.disable_color_printing": (False,) * 3,
    "metrics.enable_tensorboard": (False,) * 3,
    "metrics.save_tb_folder": ("tb",) * 3,
    "metrics.enable_wandb": (False,) * 3,
    "model.name": ("flux",) * 3,
    "model.flavor": ("flux-debug", "flux-dev", "flux-schnell"),
    "model.hf_assets_path": ("tests/assets/tokenizer", None, None),
    "optimizer.name": ("AdamW",) * 3,
    "optimizer.lr": (8e-4, 1e-4, 1e-4),
    "optimizer.eps": (1e-8,) * 3,
    "lr_scheduler.warmup_steps": (1, 3000, 3000),
    "lr_scheduler.decay_ratio": (0.0,) * 3,
    "training.local_batch_size": (4, 32, 64),
    "training.max_norm": (2.0, 1.0, 1.0),
    "training.steps": (10, 30000, 30000),
    "training.dataset": ("cc12m-test", "cc12m-wds", "cc12m-wds"),
    "training.classifier_free_guidance_prob": (0.447,) * 3,
    "training.img_size": (256,) * 3,
    "encoder.t5_encoder": ("google/t5-v1_1-xxl",) * 3,
    "encoder.clip_encoder": ("openai/clip-vit-large-patch14",) * 3,
    "encoder.max_t5_encoding_len": (256, 512, 256),
    "encoder.autoencoder_path": ("assets/hf/FLUX.1-dev/ae.safetensors",) * 3,
    "parallelism.data_parallel_replicate_degree": (1,) * 3,
    "parallelism.data_parallel_shard_degree": (-1,) * 3,
    "parallelism.context_parallel_degree": (1, None, None),
    "activation_checkpoint.mode": ("full",) * 3,
    "checkpoint.enable": (False,) * 3,
    "checkpoint.folder": ("checkpoint",) * 3,
    "checkpoint.interval": (10, 1000, 1000),
    "checkpoint.last_save_model_only": (False, True, True),
    "checkpoint.export_dtype": ("float32",) * 3,
    "checkpoint.async_mode": ("disabled",) * 3,
    "validation.enable": (False,) * 3,
    "validation.dataset": ("coco-validation",) * 3,
    "validation.freq": (5, 1000, 1000),
    "validation.local_batch_size": (8, 32, 64),
    "validation.steps": (48, 12, 6),
    "validation.enable_classifier_free_guidance": (True,) * 3,
    "validation.classifier_free_guidance_scale": (5.0,) * 3,
    "validation.denoising_steps": (4, 50, 50),
    "validation.save_img_count": (1, 50, 50),
    "validation.save_img_folder": ("img",) * 3,
    "validation.all_timesteps": (False,) * 3,
    "inference.save_img_folder": ("inference_results", None, None),
    "inference.prompts_path": ("./torchtitan/models/flux/inference/prompts.txt", None, None),
    "inference.local_batch_size": (2, None, None),
}

# name of the file -> key -> value
TORCHTITAN_FILES: dict[str, dict[str, object]] = {
    name: {key: values[column] for key, values in _VALUES.items() if values[column] is not None}
    for column, name in enumerate(_NAMES)
}


def make_toml(values: dict[str, object]) -> str:
    """`section.key` -> value, written as a TOML text with one table per section."""
    tables: dict[str, list[str]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        tables.setdefault(section, []).append(f"{key} = {json.dumps(value)}")
    return "\n".join("\n".join([f"[{section}]", *lines, ""]) for section, lines in tables.items())


def lookup(config: object, name: str) -> object:
    """The value of `section.key` in a JobConfig."""
    for part in name.split("."):
        config = getattr(config, part)
    return config
