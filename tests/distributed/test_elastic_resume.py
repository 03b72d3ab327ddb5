"""A run goes on on another number of processes, split in another way: same samples, the same loss.

With `RESUME_ROWS=all` in the environment, every row runs in bfloat16 too.
"""

import pytest

from tests.distributed.legs import ALL_ROWS, BF16, read_metrics, run_leg

STEPS = 20
STOPS = (6, 12)  # after the first and the second leg
UPDATE = 8
# Sums over ranks add up in another order: relative error of a loss after some updates. Measured: up to 1.7e-7.
FP32_TOLERANCE = 1e-6
SPLIT_TOLERANCE = 1e-5  # context and tensor parallel also order the sums within a layer anew
# One rounding of a bf16 number is 4e-3, and the mean of many is more exact. Measured: up to 1.3e-4.
BF16_TOLERANCE = 5e-4

FSDP = ()
HSDP = ("--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=2")
CP = ("--parallelism.context_parallel_degree=2",)
TP = ("--parallelism.tensor_parallel_degree=2",)
FSDP_TP = (*TP, "--parallelism.data_parallel_shard_degree=2")
DDP = ("--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1")
# Layouts as (processes, options); the run starts on the first, goes on on the second, and ends on the third.
ROWS = {
    "2 -> 1 -> 2": ((2, FSDP), (1, FSDP), (2, FSDP), FP32_TOLERANCE),
    "2 -> 4 -> 2": ((2, FSDP), (4, FSDP), (2, FSDP), FP32_TOLERANCE),
    "2 -> 8 -> 2": ((2, FSDP), (8, FSDP), (2, FSDP), FP32_TOLERANCE),
    "HSDP 2 x 2 -> FSDP 4 -> DDP 2": ((4, HSDP), (4, FSDP), (2, DDP), FP32_TOLERANCE),
    "1 -> CP 2 -> FSDP 2 x TP 2": ((1, FSDP), (2, CP), (4, FSDP_TP), SPLIT_TOLERANCE),
    "FSDP 2 x TP 2 -> TP 2 -> 1": ((4, FSDP_TP), (2, TP), (1, FSDP), SPLIT_TOLERANCE),
}
IN_BF16 = ROWS if ALL_ROWS else ("2 -> 4 -> 2", "HSDP 2 x 2 -> FSDP 4 -> DDP 2", "1 -> CP 2 -> FSDP 2 x TP 2")
# A higher rate magnifies what another order of sums rounds to another bfloat16.
DTYPES = {"fp32": (), "bf16": (*BF16, "--optimizer.lr=3e-4")}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(pictures, tmp_path_factory):
    """straight(dtype): losses and positions of a run of one process that was not stopped; each runs once."""
    done = {}

    def run(dtype: str):
        if dtype not in done:
            folder = tmp_path_factory.mktemp("straight")
            leg = run_leg(folder, 1, pictures, *shared_by(1, ()), *DTYPES[dtype], steps=STEPS)
            done[dtype] = read_metrics(folder, "loss"), leg.positions
        return done[dtype]

    return run


def shared_by(world_size: int, options: tuple[str, ...]) -> list[str]:
    """The update as the groups of processes share it, in the largest batches: one process accumulates."""
    groups = world_size // (2 if {*CP, *TP} & {*options} else 1)
    return [f"--training.global_batch_size={UPDATE}", f"--training.local_batch_size={min(4, UPDATE // groups)}"]


def difference(losses: list[float], others: list[float]) -> float:
    assert len(losses) == len(others) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


@pytest.mark.parametrize(("row", "dtype"), [*((row, "fp32") for row in ROWS), *((row, "bf16") for row in IN_BF16)])
def test_legs_on_other_layouts(straight, pictures, tmp_path, row, dtype):
    *layouts, tolerance = ROWS[row]
    positions = []
    for (world_size, options), until in zip(layouts, (*STOPS, None), strict=True):
        more = [*shared_by(world_size, options), *options, *DTYPES[dtype], "--checkpoint.interval=6"]
        leg = run_leg(tmp_path, world_size, pictures, *more, steps=STEPS, until=until)
        assert leg.first_step == len(positions)
        positions += leg.positions
    losses, straight_positions = straight(dtype)
    assert positions == straight_positions
    assert difference(read_metrics(tmp_path, "loss"), losses) <= (BF16_TOLERANCE if dtype == "bf16" else tolerance)


# What is forgotten, the number format, and what the difference must exceed.
CONTROLS = [
    ("dataloader", "fp32", 100 * SPLIT_TOLERANCE),
    ("optimizer", "fp32", 100 * SPLIT_TOLERANCE),
    ("optimizer", "bf16", 2 * BF16_TOLERANCE),
]


@pytest.mark.parametrize(("part", "dtype", "visible"), CONTROLS)
def test_control_a_leg_that_forgets_something_is_seen(straight, pictures, tmp_path, part, dtype, visible):
    options = [pictures, *shared_by(1, ()), *DTYPES[dtype], "--checkpoint.interval=6"]
    run_leg(tmp_path, 1, *options, steps=STEPS, until=6)
    leg = run_leg(tmp_path, 1, *options, f"--checkpoint.exclude_from_loading={part}", steps=STEPS)
    losses, positions = straight(dtype)
    assert (leg.positions == positions[6:]) == (part != "dataloader")
    assert difference(read_metrics(tmp_path, "loss"), losses) > visible
