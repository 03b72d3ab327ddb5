"""Rules between keys: one row for each way to break one, and one beside it that is fine."""

import pytest

from config.parse import ConfigError, parse

FAULTS = [
    ("--training.img_size=24", "training.img_size=24 must be a multiple of 16: use 16 or 32"),
    ("--training.dataset=imagefolder", 'training.dataset="imagefolder" needs training.dataset_path'),
    (
        "--validation.enable --validation.dataset=imagefolder",
        'validation.dataset="imagefolder" needs validation.dataset_path',
    ),
    ("--training.dataloader.prefetch_factor=2", "training.dataloader.prefetch_factor is about workers"),
    ("--validation.dataloader.persistent_workers", "validation.dataloader.persistent_workers is about workers"),
    ("--training.dtype=bfloat16 --training.mixed_precision_param=float32", "the time of one and the precision of the"),
    ("--inference.img_size=40", "inference.img_size=40 must be a multiple of 16: use 32 or 48"),
    ("--checkpoint.folder=..", 'checkpoint.folder=".." must stay inside the run folder: give a plain name'),
    ("--checkpoint.folder=/tmp/x", 'checkpoint.folder="/tmp/x" must stay inside the run folder'),
    ("--checkpoint.folder=a/b", 'checkpoint.folder="a/b" must stay inside the run folder'),
    ("--checkpoint.folder=.", 'checkpoint.folder="." must stay inside the run folder'),
    ("--checkpoint.folder=export", 'checkpoint.folder="export" is the folder of the weights too'),
    ("--checkpoint.folder=img", 'checkpoint.folder="img" is the folder of validation.save_img_folder too'),
    ("--checkpoint.folder=profile_traces", "is the folder of profiling.save_traces_folder too"),
    ("--checkpoint.folder=memory_snapshot", "is the folder of profiling.save_memory_snapshot_folder too"),
    (
        "--profiling.enable_profiling --profiling.profile_freq=3",
        "profiling.profile_freq=3 must be at least 4, the steps of profiler_warmup=3 and profiler_active=1: use 4 or",
    ),
    (
        "--checkpoint.initial_load_in_hf",
        "checkpoint.initial_load_in_hf=true needs checkpoint.initial_load_path: set it to a diffusers folder",
    ),
    (
        "--checkpoint.initial_load_in_hf --checkpoint.initial_load_path=x --checkpoint.initial_load_model_only=false",
        "checkpoint.initial_load_model_only=false asks for an optimizer",
    ),
    (
        "--checkpoint.create_seed_checkpoint",
        "checkpoint.create_seed_checkpoint=true saves a checkpoint, and checkpoint.enable=false saves none",
    ),
    (
        "--checkpoint.enable --checkpoint.create_seed_checkpoint --checkpoint.load_only",
        "checkpoint.create_seed_checkpoint=true saves, and checkpoint.load_only=true does not",
    ),
]
DOUBTS = [
    ("--training.dataset_path=x", 'training.dataset_path="x" is not read: shapes draws its own pictures'),
    ("--validation.dataset_path=x", 'validation.dataset_path="x" is not read'),
    (
        "--compile.enable --compile.components=",
        "compile.enable=true compiles nothing, since compile.components is empty: name model, loss or both",
    ),
    (
        "--model.attention_backend=math --parallelism.context_parallel_degree=2"
        " --parallelism.context_parallel_method=ring",
        'model.attention_backend="math" has no effect with parallelism.context_parallel_method="ring"',
    ),
    ("--training.guidance=3.5", "training.guidance=3.5 has no effect: flux-tiny embeds no guidance"),
    (
        "--validation.enable --validation.enable_classifier_free_guidance",
        "validation.enable_classifier_free_guidance=true needs a model that knows the empty prompt",
    ),
    (
        "--training.steps=5",
        "lr_scheduler.warmup_steps=200 is longer than the schedule of 5 steps: the warm-up is short",
    ),
    ("--training.steps=250 --lr_scheduler.decay_ratio=0.5", "the decay is shortened to the 50 steps after the warm-up"),
    (
        "--lr_scheduler.total_steps=500",
        "lr_scheduler.total_steps=500 ends before training.steps=10000: the rest runs at 0",
    ),
    (
        "--training.steps=100 --lr_scheduler.total_steps=300",
        "training.steps=100 ends within lr_scheduler.warmup_steps=200",
    ),
    (
        "--optimizer.bf16_rounding=stochastic",
        'optimizer.bf16_rounding="stochastic" has no effect: training.dtype="float32" keeps',
    ),
    (
        "--optimizer.state_dtype=bfloat16 --optimizer.beta2=0.999",
        "optimizer.beta2=0.999 lets a mean of squares fall by less in a step than",
    ),
    (
        "--checkpoint.interval_minutes=30",
        "checkpoint.interval_minutes=30.0 has no effect without checkpoint.enable=true",
    ),
    ("--checkpoint.keep_latest_k=3", "checkpoint.keep_latest_k=3 has no effect without checkpoint.enable=true"),
    ("--checkpoint.keep_every=1000", "checkpoint.keep_every=1000 has no effect without"),
    ("--checkpoint.async_mode=async", 'checkpoint.async_mode="async" has no effect without'),
    ("--checkpoint.enable_first_step_checkpoint", "checkpoint.enable_first_step_checkpoint=true has no effect without"),
    ("--checkpoint.load_step=100", "checkpoint.load_step=100 has no effect without checkpoint.enable=true"),
    ("--checkpoint.load_only", "checkpoint.load_only=true has no effect without checkpoint.enable=true"),
    ("--checkpoint.exclude_from_loading=optimizer", 'checkpoint.exclude_from_loading=["optimizer"] has no effect'),
    (
        "--checkpoint.exclude_from_loading=optimizer --checkpoint.initial_load_path=x",
        'checkpoint.exclude_from_loading=["optimizer"] has no effect',
    ),
    (
        "--checkpoint.enable --checkpoint.initial_load_model_only=false",
        "checkpoint.initial_load_model_only=false has no effect without checkpoint.initial_load_path",
    ),
    (
        "--checkpoint.enable --checkpoint.last_save_in_hf --checkpoint.last_save_model_only=false",
        "checkpoint.last_save_in_hf=true has no effect with checkpoint.last_save_model_only=false",
    ),
]
FINE = [
    "--training.dtype=bfloat16 --optimizer.bf16_rounding=stochastic --optimizer.state_dtype=8bit",
    "--optimizer.state_dtype=bfloat16 --optimizer.beta2=0.99",
    "--training.img_size=32 --training.global_batch_size=24 --training.dataset=imagefolder --training.dataset_path=x",
    "--validation.dataset=imagefolder",  # validation is off
    "--validation.enable --training.dataset=imagefolder --training.dataset_path=x",  # a part of it is held back
    "--validation.enable --validation.dataset=imagefolder --validation.dataset_path=x",
    "--training.dataloader.num_workers=1 --training.dataloader.prefetch_factor=2",
    "--validation.dataloader.num_workers=1 --validation.dataloader.persistent_workers",
    "--training.dtype=bfloat16",
    "--training.dtype=float32 --training.mixed_precision_param=float32",
    "--training.guidance=3.5 --model.flavor=flux-dev",
    "--model.attention_backend=math --parallelism.context_parallel_method=ring",  # of one rank
    "--model.attention_backend=math --parallelism.context_parallel_degree=2",
    "--compile.components=",
    "--compile.enable --compile.components=loss",
    "--validation.enable --validation.enable_classifier_free_guidance --training.classifier_free_guidance_prob=0.1",
    "--training.steps=200 --lr_scheduler.decay_ratio=0",
    "--training.steps=400 --lr_scheduler.decay_ratio=0.5",
    "--lr_scheduler.total_steps=500 --lr_scheduler.decay_ratio=0.0",
    "--training.dataset=cc12m-wds --validation.dataset=coco-validation --validation.enable",  # the run refuses these
    "--inference.img_size=-1",
    "--profiling.enable_profiling --profiling.profile_freq=4",
    "--profiling.enable_profiling --profiling.profile_freq=1 --profiling.profiler_warmup=0",
    "--profiling.profile_freq=3 --profiling.enable_memory_snapshot",  # there is no trace that would need more
    "--inference.img_size=512",
    "--checkpoint.interval=1000 --checkpoint.folder=saved --checkpoint.export_dtype=bfloat16",  # for when they are on
    "--checkpoint.enable --checkpoint.keep_latest_k=3 --checkpoint.keep_every=1000 --checkpoint.async_mode=async",
    "--checkpoint.enable --checkpoint.load_step=100 --checkpoint.load_only --checkpoint.interval_minutes=30",
    "--checkpoint.enable --checkpoint.exclude_from_loading=optimizer,ema --ema.enable",
    "--checkpoint.enable --checkpoint.exclude_from_loading=ema",  # of a checkpoint that has one
    "--checkpoint.last_save_in_hf --checkpoint.last_save_model_only=false",  # a run without checkpoints exports anyway
    "--checkpoint.enable --checkpoint.create_seed_checkpoint",
    "--checkpoint.initial_load_path=x",
    "--checkpoint.initial_load_path=x --checkpoint.initial_load_in_hf",
    "--checkpoint.initial_load_path=x --checkpoint.initial_load_model_only=false"
    + " --checkpoint.exclude_from_loading=optimizer",
]


@pytest.mark.parametrize(("line", "text"), FAULTS)
def test_fault(line, text):
    with pytest.raises(ConfigError) as caught:
        parse(line.split())
    (error,) = str(caught.value).splitlines()
    assert error.startswith("command line: ")
    assert text in error


@pytest.mark.parametrize(("line", "text"), DOUBTS)
def test_doubt(line, text):
    _, warnings = parse(line.split())
    assert len(warnings) == 1
    assert text in warnings[0]


@pytest.mark.parametrize("line", FINE)
def test_fine(line):
    assert parse(line.split())[1] == []


@pytest.mark.parametrize(("world_size", "is_fine"), [(None, True), (1, True), (4, False)])
def test_a_seed_checkpoint_is_made_by_one_process(world_size, is_fine):
    line = ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--training.global_batch_size=-1"]
    if is_fine:
        assert parse(line, world_size)[1] == []
        return
    with pytest.raises(ConfigError, match="is the work of one process, and there are 4: start it with NGPU=1"):
        parse(line, world_size)


def test_each_key_without_effect_is_named():
    assert len(parse(["--checkpoint.load_only", "--checkpoint.keep_every=7", "--checkpoint.load_step=0"])[1]) == 3


@pytest.mark.parametrize(
    "key",
    [
        "metrics.save_tb_folder",
        "validation.save_img_folder",
        "profiling.save_traces_folder",
        "profiling.save_memory_snapshot_folder",
    ],
)
@pytest.mark.parametrize("folder", ["../elsewhere", "/tmp/elsewhere"])
def test_what_a_run_writes_stays_in_its_folder(key, folder):
    with pytest.raises(ConfigError, match=rf"{key}=.* must stay inside the run folder"):
        parse([f"--{key}={folder}"])


def test_validating_on_the_training_folder_is_doubted():
    folders = ["--training.dataset=imagefolder", "--training.dataset_path=p", "--validation.dataset_path=p"]
    warnings = parse([*folders, "--validation.enable"])[1]
    assert any("nothing is held out" in warning for warning in warnings)
