"""What is told when memory runs out: sizes as they really are, and options that really help."""

import pytest
import torch

from build import build_model, build_run_layout
from config.parse import load_config
from flux.spec import SPECS
from memory_advice import GIB, MIB, Remedy, describe_out_of_memory, out_of_memory_told, state_bytes, state_remedies
from parallel.degrees import Degrees
from parallel.mesh import Layout, close_layout
from parallel.shards import local_bytes
from scripts.dry_run import take_dry_step
from training.config import Optimizer
from training.ema import build_ema
from training.optimizer import build_optimizer

SHARD, REPLICATE = "parallelism.data_parallel_shard_degree", "parallelism.data_parallel_replicate_degree"
TINY = ["--training.local_batch_size=4", "--training.img_size=64", "--activation_checkpoint.mode=none"]
FULL = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 GiB is free."


def config_of(*options: str, world_size: int = 1):
    return load_config([*TINY, *options], world_size, quiet=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_ema", [False, True])
def test_the_state_is_what_a_first_update_leaves(dtype, with_ema):
    model = torch.nn.Linear(30, 20, dtype=dtype)
    optimizer = build_optimizer([list(model.parameters())], Optimizer())
    model(torch.ones(2, 30, dtype=dtype)).sum().backward()
    optimizer.step()
    kept = [*model.parameters(), *(parameter.grad for parameter in model.parameters())]
    kept += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    kept += build_ema(dict(model.named_parameters())).values() if with_ema else []
    assert state_bytes(model.parameters(), with_ema) == sum(map(local_bytes, kept))


@pytest.mark.parametrize("options", [[], ["--parallelism.tensor_parallel_degree=2", "--training.dtype=bfloat16"]])
def test_the_state_of_a_rank_is_what_the_dry_run_counts(options):
    config = config_of(*options, "--comm.mode=fake_backend", world_size=8)
    run = take_dry_step(config, 8)
    layout = build_run_layout(config, 8)
    try:
        model = build_model(config, SPECS[config.model.flavor], layout)
        state = state_bytes(model.parameters(), with_ema=False)
    finally:
        close_layout(layout)
    assert state == run.weights + run.gradients + run.optimizer_states


@pytest.mark.parametrize(
    ("degrees", "option", "left"),
    [
        (Degrees(), f"{SHARD}=2 on twice as many GPUs", 1 / 2),
        (Degrees(dp_shard=8, cp=2), f"{SHARD}=16 on twice as many GPUs", 1 / 2),
        (Degrees(dp_replicate=4, dp_shard=8), f"{SHARD}=16 with {REPLICATE}=2", 1 / 2),
        (Degrees(dp_replicate=3, dp_shard=2), f"{SHARD}=6 with {REPLICATE}=1", 1 / 3),
    ],
)
def test_more_shards_leave_less_on_each_rank(degrees, option, left):
    assert state_remedies(degrees, 600) == [
        Remedy("training.enable_cpu_offload=true", 600),
        Remedy(option, 600 - 600 * left),
    ]


def test_the_most_helpful_comes_first():
    remedies = [Remedy("a=1", 300 * MIB), Remedy("b=2", 41 * GIB), Remedy("c=3", GIB)]
    assert describe_out_of_memory(config_of(), FULL, remedies) == (
        "out of memory (tried to allocate 1.50 GiB) with training.local_batch_size=4, training.img_size=64 and "
        'activation_checkpoint.mode="none": on each rank, b=2 saves 41.0 GiB, c=3 saves 1.0 GiB, a=1 saves 300.0 MiB'
    )


def test_options_are_named_where_no_figure_is_known():
    text = describe_out_of_memory(config_of(), "CUDA error: out of memory", [])
    assert text.startswith("out of memory with training.local_batch_size=4, ") and "saves" not in text
    assert 'set activation_checkpoint.mode="full"' in text and "\n" not in text
    assert "set activation_checkpoint" not in describe_out_of_memory(
        config_of("--activation_checkpoint.mode=full"), "", []
    )


def told(config, device: str, model=None, activations=(), error=None) -> str:
    """What a step that does not fit becomes."""
    layout = Layout(Degrees(), torch.device(device))
    with pytest.raises(ValueError) as caught, out_of_memory_told(config, layout, model, activations):
        raise error or torch.OutOfMemoryError(FULL)
    return str(caught.value)


def test_figures_are_those_of_the_model_and_of_its_activations():
    model = torch.nn.Linear(2**10, 2**18, bias=False, device="meta")  # 1 GiB in float32
    text = told(config_of(), "cuda", model, [Remedy("training.local_batch_size=2", 3 * GIB)])
    assert text.endswith(
        "on each rank, training.enable_cpu_offload=true saves 4.0 GiB, training.local_batch_size=2 saves 3.0 GiB, "
        f"{SHARD}=2 on twice as many GPUs saves 2.0 GiB"
    )
    assert "training.enable_cpu_offload=true saves 5.0 GiB" in told(config_of("--ema.enable"), "cuda", model)


def test_what_would_not_help_is_not_named():
    model = torch.nn.Linear(2, 2)
    offloaded = config_of("--training.enable_cpu_offload")
    for text in (
        told(config_of(), "cpu", model, error=MemoryError()),
        told(offloaded, "cuda", model),
        told(config_of(), "cuda"),  # there is no model yet
    ):
        assert "enable_cpu_offload" not in text and SHARD not in text


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert triggered"), KeyError("out of memory")])
def test_other_errors_pass(error):
    layout = Layout(Degrees(), torch.device("cuda"))
    with pytest.raises(type(error)) as caught, out_of_memory_told(config_of(), layout):
        raise error
    assert caught.value is error
