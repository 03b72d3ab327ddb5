"""Every layout computes what one process does: loss, every gradient, and the random draws of every sample.

Trained through the real FluxTrainer on gloo ranks; `pytest tests/distributed -k "row"` runs one row.
"""

import numpy as np
import pytest

from tests.distributed.layouts import Outcome, train_layout

LOSS_TOLERANCE = 1e-6  # relative, over all steps; fp32 sums in another order give 1e-7
GRADIENT_TOLERANCE = 1e-5  # relative norm of each parameter; fp32 gives 1e-6, in the small gradients of query norms
FAULT = 100  # times the gradients' tolerance: what a fault must exceed; the loss hardly sees some of them

REPLICATE = "--parallelism.data_parallel_replicate_degree={}".format
CP = "--parallelism.context_parallel_degree={}".format
TP = "--parallelism.tensor_parallel_degree={}".format
METHOD = "--parallelism.context_parallel_method={}".format
ATTENTION = "--model.attention_backend={}".format
BATCH = "--training.local_batch_size={}".format
RECOMPUTE = "--activation_checkpoint.mode={}".format

# name: (processes, options). Every update has 8 samples; what the local batches do not reach is accumulated.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp 2": (2, (BATCH(4), REPLICATE(2))),
    "fsdp 2": (2, (BATCH(4),)),
    "fsdp 4": (4, (BATCH(2),)),
    "hsdp 2x2": (4, (BATCH(2), REPLICATE(2))),
    **{
        f"cp {degree} {method}": (degree, (CP(degree), METHOD(method)))
        for degree in (2, 4)
        for method in ("ulysses", "allgather", "ring")
    },
    "tp 2": (2, (TP(2),)),
    "tp 4": (4, (TP(4),)),
    "fsdp 2 x cp 2": (4, (BATCH(4), CP(2))),
    "fsdp 2 x tp 2": (4, (BATCH(4), TP(2))),
    "cp 2 x tp 2": (4, (CP(2), TP(2))),
    "hsdp 2x2 x cp 2": (8, (BATCH(2), REPLICATE(2), CP(2))),
    "accumulation 2": (1, (BATCH(4),)),
    "fsdp 2, accumulation 2": (2, (BATCH(2),)),
    "cp 2, accumulation 2": (2, (BATCH(4), CP(2))),
    "cp 2 ring, accumulation 2, recompute full": (2, (BATCH(4), CP(2), METHOD("ring"), RECOMPUTE("full"))),
    "fsdp 2, never reshard": (2, (BATCH(4), "--parallelism.fsdp_reshard_after_forward=never")),
    "fsdp 2, always reshard": (2, (BATCH(4), "--parallelism.fsdp_reshard_after_forward=always")),
    "fsdp 2, prefetch": (
        2,
        (BATCH(4), "--parallelism.fsdp_forward_prefetch=2", "--parallelism.fsdp_backward_prefetch=3"),
    ),
    "fsdp 2, cpu offload": (2, (BATCH(4), "--training.enable_cpu_offload")),
    "activation offload": (1, (BATCH(8), "--activation_checkpoint.cpu_offload")),
    "fsdp 2, activation offload, recompute full": (
        2,
        (BATCH(4), "--activation_checkpoint.cpu_offload", RECOMPUTE("full")),
    ),
    "cp 2 ring, activation offload": (2, (CP(2), METHOD("ring"), "--activation_checkpoint.cpu_offload")),
    "fsdp 2, activation offload, compile": (
        2,
        (BATCH(4), "--activation_checkpoint.cpu_offload", "--compile.enable", "--compile.backend=aot_eager"),
    ),
    "encoder offload": (1, (BATCH(8), "--encoder.cpu_offload")),
    "fsdp 2, encoder offload": (2, (BATCH(4), "--encoder.cpu_offload")),
    "recompute full": (1, (RECOMPUTE("full"),)),
    "recompute half": (1, (RECOMPUTE("full"), "--activation_checkpoint.ratio=0.5")),
    "recompute every 2nd": (1, (RECOMPUTE("selective"), "--activation_checkpoint.selective_ac_option=2")),
    "recompute by operator": (1, (RECOMPUTE("selective"), "--activation_checkpoint.selective_ac_option=op")),
    "fsdp 2, recompute full": (2, (BATCH(4), RECOMPUTE("full"))),
    "cp 2, recompute full": (2, (CP(2), RECOMPUTE("full"))),
    "cp 2, recompute by operator": (
        2,
        (CP(2), RECOMPUTE("selective"), "--activation_checkpoint.selective_ac_option=op"),
    ),
    "tp 2, recompute full": (2, (TP(2), RECOMPUTE("full"))),
    "cp 2, math": (2, (CP(2), ATTENTION("math"))),
    "cp 2 allgather, math, compile": (
        2,
        (CP(2), METHOD("allgather"), ATTENTION("math"), "--compile.enable", "--compile.backend=aot_eager"),
    ),
    "compile": (1, ("--compile.enable",)),
    "fsdp 2, compile": (2, (BATCH(4), "--compile.enable", "--compile.backend=aot_eager")),
    "cp 2, compile": (2, (CP(2), "--compile.enable", "--compile.backend=aot_eager")),
    "cp 2 allgather, compile, recompute full": (
        2,
        (CP(2), METHOD("allgather"), RECOMPUTE("full"), "--compile.enable", "--compile.backend=aot_eager"),
    ),
    "tp 2, compile": (2, (TP(2), "--compile.enable", "--compile.backend=aot_eager")),
    "compile, recompute full": (1, ("--compile.enable", "--compile.backend=aot_eager", RECOMPUTE("full"))),
    "compile, memory budget": (
        1,
        ("--compile.enable", RECOMPUTE("memory_budget"), "--activation_checkpoint.memory_budget=0.3"),
    ),
}
# What a fault changes, and the layout that shows it.
FAULTS = {
    "noise_by_rank": "fsdp 2",
    "causal_attention": "fsdp 2",
    "gradients_stay_on_their_rank": "ddp 2",
    "gradients_are_means": "fsdp 2",
    "modulation_stays_in_its_copy": "ddp 2",
    "modulation_gradients_are_means": "fsdp 2",
    "modulation_of_other_samples": "fsdp 2",
    "times_by_rank": "cp 2 ulysses",
    "keys_of_this_rank_only": "cp 2 allgather",
    "rows_split_in_one_piece": "tp 2",
}
QUICK = ("fsdp 2", "cp 2 ulysses", "tp 2")


@pytest.fixture(scope="module")
def one_process() -> Outcome:
    return train_layout(1, BATCH(8))


def distances(outcome: Outcome, reference: Outcome) -> tuple[float, dict[str, float]]:
    """The largest relative distance of a loss, and of each gradient the relative norm of the difference."""
    losses = [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(outcome.losses, reference.losses, strict=True)]
    assert outcome.gradients.keys() == reference.gradients.keys()
    gradients = {
        name: float(np.linalg.norm(outcome.gradients[name] - whole) / np.linalg.norm(whole))
        for name, whole in reference.gradients.items()
    }
    return max(losses), gradients


def layout_rows() -> list:
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in LAYOUTS]


def test_no_gradient_of_the_comparison_is_zero(one_process):
    assert [name for name, gradient in one_process.gradients.items() if not np.any(gradient)] == []
    assert len(one_process.draws) == 5 * 8


@pytest.mark.parametrize("name", layout_rows())
def test_a_layout_gives_the_numbers_of_one_process(one_process, name):
    processes, options = LAYOUTS[name]
    outcome = train_layout(processes, BATCH(8), *options)
    loss, gradients = distances(outcome, one_process)
    worst = max(gradients, key=lambda parameter: gradients[parameter])
    assert loss < LOSS_TOLERANCE
    assert gradients[worst] < GRADIENT_TOLERANCE, worst
    assert outcome.draws == one_process.draws, "times and noise, bit by bit"
    assert outcome.grad_norms == pytest.approx(one_process.grad_norms, rel=GRADIENT_TOLERANCE)


@pytest.mark.slow
def test_hidden_padding_under_context_parallel():
    """The mask of text tokens is split and gathered with the keys."""
    hidden = (BATCH(8), "--encoder.mask_padding", "--encoder.max_t5_encoding_len=24")
    reference = train_layout(1, *hidden)
    for method in ("ulysses", "allgather"):
        loss, gradients = distances(train_layout(2, *hidden, CP(2), METHOD(method)), reference)
        assert loss < LOSS_TOLERANCE and max(gradients.values()) < GRADIENT_TOLERANCE, method
    seen = train_layout(1, BATCH(8), "--encoder.max_t5_encoding_len=24")
    assert max(distances(seen, reference)[1].values()) > FAULT * GRADIENT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_does_not_go_unseen(one_process, fault):
    processes, options = LAYOUTS[FAULTS[fault]]
    try:
        outcome = train_layout(processes, BATCH(8), *options, fault=fault)
    except AssertionError as error:
        assert "ranks differ" in str(error)
    else:
        loss, gradients = distances(outcome, one_process)
        assert loss > LOSS_TOLERANCE and max(gradients.values()) > FAULT * GRADIENT_TOLERANCE


def test_fsdp_splits_the_weights_and_ddp_does_not(one_process):
    whole = one_process.local_weights
    assert train_layout(2, BATCH(4)).local_weights == pytest.approx(whole / 2, rel=0.01)
