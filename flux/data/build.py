"""The two loaders of a run. Training and validation never see the same picture."""

from flux.config import Encoder, Training, Validation
from flux.data.loader import (
    VALIDATION_TIMES,
    Loader,
    PositionBatches,
    PositionedDataset,
    TrainingDraws,
    ValidationDraws,
)
from flux.data.sources import Split, build_source
from flux.data.tokenizers import FluxTokenizer
from flux.spec import ModelSpec


def build_training_loader(
    training: Training,
    validation: Validation,
    encoder: Encoder,
    spec: ModelSpec,
    tokenizer: FluxTokenizer,
    seed: int,
    group: int,
    groups: int,
    cursor: int,
) -> Loader:
    """The endless training batches from position `cursor` on: those of one of `groups` that see different samples."""
    split: Split = "train" if validation.enable and not _validates_elsewhere(validation) else "all"
    source = build_source(training.dataset, training.dataset_path, training.img_size, split, "training")
    draws = TrainingDraws(
        seed=seed,
        timestep_distribution=training.timestep_distribution,
        shift_by_resolution=training.timestep_shift == "resolution",
        drop_prob=training.classifier_free_guidance_prob,
        drop_jointly=training.prompt_dropout == "joint",
        sample_posterior=encoder.sample_posterior,
    )
    dataset = PositionedDataset(source, tokenizer, spec, training.img_size, draws)
    return Loader(dataset, PositionBatches(cursor, training.local_batch_size, group, groups), training.dataloader)


def build_validation_loader(
    training: Training,
    validation: Validation,
    encoder: Encoder,
    spec: ModelSpec,
    tokenizer: FluxTokenizer,
    seed: int,
    group: int,
    groups: int,
) -> Loader:
    """Held-out samples, the same ones with the same noise and times at every pass, dealt to `groups`."""
    if _validates_elsewhere(validation):
        name = validation.dataset or training.dataset
        split: Split = "validation" if name == "shapes" else "all"
        source = build_source(name, validation.dataset_path, training.img_size, split, "validation")
    else:
        source = build_source(training.dataset, training.dataset_path, training.img_size, "validation", "training")
    end = max(len(source), VALIDATION_TIMES)  # a few pictures are shown at every time rather than each at one
    if validation.steps != -1:
        end = min(end, validation.steps * validation.local_batch_size)
    draws = ValidationDraws(seed=seed, sample_posterior=encoder.sample_posterior)
    dataset = PositionedDataset(source, tokenizer, spec, training.img_size, draws)
    return Loader(dataset, PositionBatches(0, validation.local_batch_size, group, groups, end), validation.dataloader)


def _validates_elsewhere(validation: Validation) -> bool:
    """Whether validation has a data set of its own; otherwise a part of the training data is held out for it."""
    return validation.dataset is not None or validation.dataset_path is not None
