"""The whole configuration of a run: one field per section. Each section belongs to the room that reads it."""

from dataclasses import dataclass, field

from checkpoint.config import Checkpoint
from flux.config import Encoder, Model, Training, Validation
from runtime.config import Debug, Job
from training.config import LRScheduler, Metrics, Optimizer


@dataclass(frozen=True)
class JobConfig:
    """Validated and complete: `config.parse.load_config` makes it, nothing changes it."""

    job: Job = field(default_factory=Job)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    encoder: Encoder = field(default_factory=Encoder)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    debug: Debug = field(default_factory=Debug)
