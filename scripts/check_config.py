"""Says whether a configuration is valid, and what it asks for, without training and without importing torch.

    python -m scripts.check_config FILE [--section.key value ...]

NGPU is the number of processes that the run would have; without it, what depends on it is not checked.
Exit code 0: valid, with a summary. 2: not valid; every error is listed on stderr.
"""

import os
import signal
import sys

from config.help import help_text
from config.job_config import JobConfig
from config.parse import ConfigError, parse, read_process_count
from flux.spec import PIXELS_PER_TOKEN
from parallel.degrees import resolve_degrees
from redact import redact
from runtime import exit_codes


def summarize(config: JobConfig, world_size: int | None) -> str:
    """What a valid configuration will do, on one screen.

    Args:
        config: valid for this number of processes.
        world_size: number of processes; None: not known.
    """
    training, optimizer, validation = config.training, config.optimizer, config.validation
    side = training.img_size // PIXELS_PER_TOKEN
    degrees = resolve_degrees(config.parallelism, world_size)
    update = training.update_size(degrees.dp)
    layout = f"{degrees.world} processes = {degrees}" if degrees.world > 1 else str(degrees)
    if world_size is None:
        layout = "NGPU is not set: what follows is for " + layout
    data = training.dataset + (f" in {training.dataset_path}" if training.dataset_path else "")
    checks = f"loss every {validation.freq} steps"
    if validation.eval_freq:
        checks += f", {validation.save_img_count} pictures every {validation.eval_freq} steps"
    lines = {
        "layout": layout,
        "model": f"{config.model.flavor}, weights in {training.dtype}, computing in {training.mixed_precision_param}",
        "tokens": f"{training.img_size} px: {side} x {side} = {side * side} image"
        f" + {config.encoder.max_t5_encoding_len} text = {side * side + config.encoder.max_t5_encoding_len}",
        "data": data,
        "batch": training.describe_update(degrees.dp),
        "length": f"{training.steps} updates x {update} = {training.steps * update:,} samples",
        "optimizer": f"{optimizer.name}, lr {optimizer.lr:g}, warm-up {config.lr_scheduler.warmup_steps} steps",
        "validation": checks if validation.enable else "off",
        "folder": config.job.dump_folder,
    }
    return "\n".join(f"  {name:<11}{text}" for name, text in lines.items())


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return exit_codes.OK
    if argv and not argv[0].startswith("-"):
        argv = ["--job.config_file", *argv]
    try:
        world_size = read_process_count(os.environ)
        config, warnings = parse(argv, world_size)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return exit_codes.CONFIG
    print(redact("\n".join(["ok", summarize(config, world_size), *(f"warning: {warning}" for warning in warnings)])))
    return exit_codes.OK


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
    sys.exit(main(sys.argv[1:]))
