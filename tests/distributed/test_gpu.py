"""The comparison of layouts on GPUs with NCCL, and one GPU's techniques beside fp32; skipped where there are none."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from config.parse import load_config
from parallel.attention import KERNELS
from tests.distributed.layouts import train_layout
from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import BATCH, LAYOUTS, distances

# GPUs add up in other orders for other sizes, and their fp32 products are no more exact than that.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
CURVE_TOLERANCE = 0.01  # of the loss, averaged over ten steps: what a reader of a curve would not see
STEPS = 50

DEBUG = [
    "--job.config_file=train_configs/flux_debug.toml",
    "--training.test_mode",
    "--training.dataset=shapes",
    "--training.local_batch_size=8",
    f"--training.steps={STEPS}",
    "--validation.enable=false",
    "--activation_checkpoint.mode=none",
    "--optimizer.lr=2e-4",
    "--lr_scheduler.warmup_steps=10",
    "--debug.seed=0",
]
ATTENTION = "--model.attention_backend={}".format
BF16 = "--training.mixed_precision_param=bfloat16"
FLOAT8 = "--model.converters=quantize.linear.float8"
BY_OPERATOR = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")
TECHNIQUES: dict[str, tuple[str, ...]] = {
    "bf16": (BF16,),
    "bf16, compile": (BF16, "--compile.enable"),
    "bf16, recompute full": (BF16, "--activation_checkpoint.mode=full"),
    "bf16, offload": (BF16, "--activation_checkpoint.cpu_offload"),
    "bf16, offload, recompute full, compile": (
        *(BF16, "--activation_checkpoint.cpu_offload", "--activation_checkpoint.mode=full", "--compile.enable"),
    ),
    "bf16, mask": (BF16, "--encoder.mask_padding"),
    "float8 tensorwise, compile": (BF16, FLOAT8, "--compile.enable"),
    "float8 rowwise, compile": (BF16, FLOAT8, "--quantize.linear.float8.recipe_name=rowwise", "--compile.enable"),
    **{f"bf16, {backend}": (BF16, ATTENTION(backend)) for backend in KERNELS},
    **{
        f"bf16, {backend}, compile": (BF16, ATTENTION(backend), "--compile.enable", *BY_OPERATOR) for backend in KERNELS
    },
}

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(GPUS == 0, reason="needs a GPU")]


@pytest.mark.skipif(GPUS < 8, reason="needs 8 GPUs")
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_numbers_of_one_gpu(name):
    reference = train_layout(1, BATCH(8), device="cuda")
    processes, options = LAYOUTS[name]
    outcome = train_layout(processes, BATCH(8), *options, device="cuda")
    loss, gradients = distances(outcome, reference)
    assert loss < LOSS_TOLERANCE
    assert max(gradients.values()) < GRADIENT_TOLERANCE
    assert outcome.draws == reference.draws


def train_curve(rank: int, world_size: int, folder: str, options: tuple[str, ...]) -> list[float] | str:
    """The loss of each step, of flux-debug on one GPU; or why it does not train so."""
    from build import choose_techniques
    from parallel.parallelize import check_techniques
    from train import FluxTrainer, build_run_layout

    config = load_config([*DEBUG, *options], world_size)
    try:
        check_techniques(choose_techniques(config), "cuda")
    except ValueError as error:
        return str(error)
    trainer = FluxTrainer(config, Path(folder), build_run_layout(config, world_size))
    batches = iter(trainer.loader)
    return [trainer.train_step(batches)[0].item() for _ in range(STEPS)]


def smooth(losses: list[float]) -> np.ndarray:
    return np.convolve(losses, np.ones(10) / 10, mode="valid")


@pytest.fixture(scope="module")
def fp32_curve(tmp_path_factory) -> np.ndarray:
    options = ("--training.mixed_precision_param=float32",)
    folder = str(tmp_path_factory.mktemp("fp32"))
    return smooth(run_ranks(train_curve, 1, folder, options, timeout=600, device="cuda")[0])


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_trains_like_fp32(fp32_curve, tmp_path, name):
    options = TECHNIQUES[name]
    if FLOAT8 in options and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    losses = run_ranks(train_curve, 1, str(tmp_path), options, timeout=600, device="cuda")[0]
    if isinstance(losses, str) and "model.attention_backend" in losses:
        pytest.skip(losses)
    curve = smooth(losses)
    assert np.abs(curve / fp32_curve - 1).max() < CURVE_TOLERANCE
    assert not np.array_equal(curve, fp32_curve)


def test_control_another_learning_rate_is_another_curve(fp32_curve, tmp_path):
    options = ("--training.mixed_precision_param=float32", "--optimizer.lr=2e-5")
    curve = smooth(run_ranks(train_curve, 1, str(tmp_path), options, timeout=600, device="cuda")[0])
    assert np.abs(curve / fp32_curve - 1).max() > CURVE_TOLERANCE


def train_unwatched(rank: int, world_size: int, folder: str, overrides: tuple[str, ...]) -> tuple[list[dict], str]:
    """Trains while CUDA refuses to let the host wait, with figures after every step. Returns these, and what was said
    to one read.
    """
    from train import FluxTrainer, build_run_layout

    config = load_config([*DEBUG, BF16, "--metrics.log_freq=1", *overrides], world_size)
    trainer = FluxTrainer(config, Path(folder), build_run_layout(config, world_size))
    shown: list[dict] = []
    trainer.report._step_log.report = lambda step, values: shown.append(dict(values))
    loader = iter(trainer.loader)
    batches = iter([next(loader) for _ in range(9 * trainer.accumulation)])

    def take_step() -> torch.Tensor:
        loss, norm = trainer.train_step(batches)
        trainer.report.tell()
        trainer._log_step(loss, norm, lr=0.0)
        return norm

    for _ in range(6):  # allocates, chooses kernels, records a graph
        take_step()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        norm = take_step()
    try:
        norm.item()
        said = ""
    except RuntimeError as error:
        said = str(error)
    torch.cuda.set_sync_debug_mode("default")
    trainer.report.tell()
    return shown, said


@pytest.mark.parametrize(
    "options",
    [
        (),
        (BATCH(4), "--training.global_batch_size=8"),
        ("--activation_checkpoint.cpu_offload",),
        ("--compile.cuda_graph",),
    ],
    ids=["one batch", "accumulated", "offloaded", "CUDA graph"],
)
def test_no_step_waits_for_the_gpu_to_tell_a_figure(tmp_path, options):
    lines, said = run_ranks(train_unwatched, 1, str(tmp_path), options, timeout=600, device="cuda")[0]
    assert "synchronizing" in said, "CUDA sees it when the host waits"
    assert [line["samples_seen"] for line in lines] == [8 * step for step in range(1, 10)]
    figures = lines[-1]
    assert 0 < figures["encode_percent"] < 100 and 0 < figures["matmul_percent"] < 100
    assert sum(value**2 for name, value in figures.items() if name.startswith("grad_norm/")) > 0
    assert figures["loss_max"] == pytest.approx(figures["loss"], rel=LOSS_TOLERANCE)


def train_exactly(rank: int, world_size: int, folder: str, overrides: tuple[str, ...]) -> tuple[list, dict]:
    """Loss and gradient norm of each step with deterministic kernels, and what is known of the encoders after them."""
    from train import FluxTrainer, build_run_layout
    from training.determinism import apply_determinism

    apply_determinism(True, warn_only=False)
    config = load_config([*DEBUG, BF16, "--training.steps=8", *overrides], world_size)
    trainer = FluxTrainer(config, Path(folder), build_run_layout(config, world_size))
    batches = islice(trainer.loader, 8 * trainer.accumulation)
    told = [tuple(one.item() for one in trainer.train_step(batches)) for _ in range(8)]
    weight = next(trainer.encoders.conditioner.t5.parameters())
    local = getattr(weight, "_local_tensor", weight)
    return told, {"home": local.device.type, "pinned": local.is_pinned(), "ahead": trainer.ahead.stream is not None}


@pytest.mark.parametrize("options", [(), (BATCH(4), "--training.global_batch_size=8")], ids=["one", "accumulated"])
def test_encoders_beside_the_step_or_in_the_hosts_memory_change_no_bit(tmp_path, options):
    def run(*more: str) -> tuple[list, dict]:
        return run_ranks(train_exactly, 1, str(tmp_path), (*options, *more), timeout=600, device="cuda")[0]

    in_turn, known = run("--encoder.encode_ahead=false")
    assert known == {"home": "cuda", "pinned": False, "ahead": False}
    beside, known = run()
    assert known == {"home": "cuda", "pinned": False, "ahead": True}
    offloaded, known = run("--encoder.cpu_offload")
    assert known == {"home": "cpu", "pinned": True, "ahead": True}
    assert beside == in_turn and offloaded == in_turn
    assert run("--debug.seed=1")[0] != in_turn


@pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")
def test_encoders_that_ranks_share_work_beside_the_step(tmp_path):
    """T5 is gathered on another stream than the model: ranks that gathered in different orders would wait forever."""
    runs = [
        run_ranks(train_exactly, 2, str(tmp_path), (BATCH(4), *more), timeout=600, device="cuda")
        for more in (("--encoder.encode_ahead=false",), (), ("--encoder.cpu_offload",))
    ]
    assert [[told for told, _ in run] for run in runs] == 3 * [[told for told, _ in runs[0]]]


def encode_beside_a_busy_gpu(rank: int, world_size: int, folder: str) -> bool:
    """Whether the next batch is encoded while the stream of the steps is still at work."""
    from train import FluxTrainer, build_run_layout

    config = load_config([*DEBUG, BF16], world_size)
    trainer = FluxTrainer(config, Path(folder), build_run_layout(config, world_size))
    batches = iter(trainer.loader)
    for _ in range(3):  # allocates, and chooses kernels
        trainer.train_step(batches)
    trainer.ahead.take(batches)
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # cycles: two seconds
    at_work = torch.cuda.Event()
    at_work.record()
    trainer.ahead.look_ahead(batches)
    trainer.ahead.stream.synchronize()
    return not at_work.query()


def test_a_batch_is_encoded_while_a_step_runs(tmp_path):
    assert run_ranks(encode_beside_a_busy_gpu, 1, str(tmp_path), timeout=600, device="cuda") == [True]


def kept_on_the_gpu(rank: int, world_size: int, folder: str, overrides: tuple[str, ...]) -> tuple[int, list[float]]:
    """Bytes that a forward pass leaves for the backward pass, and the norms of the modules' gradients after it."""
    from train import FluxTrainer, build_run_layout

    config = load_config([*DEBUG, BF16, "--encoder.encode_ahead=false", *overrides], world_size)
    trainer = FluxTrainer(config, Path(folder), build_run_layout(config, world_size))
    batches = iter(trainer.loader)
    trainer.train_step(batches)
    raw, encoded = trainer.ahead.take(batches)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = trainer.squared_errors(raw, encoded).sum()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    trainer.clip_gradients()
    return kept, [norm.item() for norm in trainer.grad_norms.values()]


def test_offloaded_activations_leave_the_gpu(tmp_path):
    def run(*options: str) -> tuple[int, list[float]]:
        return run_ranks(kept_on_the_gpu, 1, str(tmp_path), options, timeout=600, device="cuda")[0]

    kept, norms = run()
    offloaded, same = run("--activation_checkpoint.cpu_offload")
    assert offloaded < 0.2 * kept
    assert same == pytest.approx(norms, rel=CURVE_TOLERANCE)


def train_to_the_bit(rank: int, world_size: int, folder: str, options: tuple[str, ...]) -> tuple[list[float], float]:
    """The loss of each of a few steps, with a pass without gradients in between, and a sum over all weights."""
    from parallel.data_parallel import reshard
    from train import FluxTrainer, build_run_layout
    from training.determinism import apply_determinism

    apply_determinism(True, False)
    config = load_config([*DEBUG, BF16, *options], world_size)
    trainer = FluxTrainer(config, Path(folder), build_run_layout(config, world_size))
    batches, losses = iter(trainer.loader), []
    for step in range(12):
        losses.append(trainer.train_step(batches)[0].item())
        if step == 8:  # as in validation
            with torch.no_grad():
                trainer.squared_errors(*trainer.ahead.encode(next(batches)))
            reshard(trainer.model)
    weights = sum(parameter.detach().double().abs().sum() for parameter in trainer.model.parameters())
    return losses, float(full_number(weights))


def full_number(number: torch.Tensor) -> torch.Tensor:
    return number.full_tensor() if hasattr(number, "full_tensor") else number


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs"))])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--training.local_batch_size=4", "--training.global_batch_size=16"),
        ("--compile.enable",),
        ("--activation_checkpoint.mode=full",),
        ("--parallelism.fsdp_reshard_after_forward=never",),
    ],
    ids=["plain", "accumulated", "compiled", "recomputed", "never resharded"],
)
def test_a_replayed_graph_computes_the_same_bits(tmp_path, options, world_size):
    plain, replayed = (
        run_ranks(train_to_the_bit, world_size, str(tmp_path), (*options, *more), timeout=600, device="cuda")
        for more in ((), ("--compile.cuda_graph",))
    )
    assert plain == replayed
    assert len(set(plain[0][0])) == len(plain[0][0]), "control: every step has a loss of its own"
