"""The whole configuration of a run: one field per section. Each section belongs to the room that reads it."""

from dataclasses import dataclass, field

from checkpoint.config import Checkpoint
from flux.config import Data, Encoder, Inference, Model, Training, Validation
from parallel.config import ActivationCheckpoint, Comm, Compile, Parallelism, Quantize
from runtime.config import Debug, Job, Reliability
from training.config import EMA, LRScheduler, Metrics, Optimizer, Profiling


@dataclass(frozen=True)
class JobConfig:
    """Validated and complete: `config.parse.load_config` makes it, nothing changes it."""

    job: Job = field(default_factory=Job)
    profiling: Profiling = field(default_factory=Profiling)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    encoder: Encoder = field(default_factory=Encoder)
    training: Training = field(default_factory=Training)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    ema: EMA = field(default_factory=EMA)
    validation: Validation = field(default_factory=Validation)
    inference: Inference = field(default_factory=Inference)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    quantize: Quantize = field(default_factory=Quantize)
    comm: Comm = field(default_factory=Comm)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    reliability: Reliability = field(default_factory=Reliability)
    debug: Debug = field(default_factory=Debug)
