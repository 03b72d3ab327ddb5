"""What logged steps tell is the same on every layout; the largest loss of a rank is the largest of a rank."""

import tempfile

import pytest

from tests.distributed.layouts import build_trainer, log_step
from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import BATCH, CP, REPLICATE, TP

FIGURE_TOLERANCE = 1e-5  # relative; fp32 sums in another order
STEPS, LOG_FREQ = 4, 2  # logged: 1, 2 and 4
DROPOUT = ("--training.classifier_free_guidance_prob=0.5", f"--metrics.log_freq={LOG_FREQ}")
ROWS = {
    "fsdp 2": (2, (BATCH(4),)),
    "hsdp 2x2": (4, (BATCH(2), REPLICATE(2))),
    "cp 2": (2, (BATCH(8), CP(2))),
    "tp 2": (2, (BATCH(8), TP(2))),
    "fsdp 2 x cp 2": (4, (BATCH(4), CP(2))),
    "accumulation 2": (1, (BATCH(4),)),
    "fsdp 2, cpu offload": (2, (BATCH(4), "--training.enable_cpu_offload")),
}
QUICK = ("fsdp 2", "cp 2", "tp 2")


def log_steps(rank: int, world_size: int, folder: str, overrides: tuple[str, ...]) -> list[tuple[float, dict]]:
    """Of each logged step, this rank's own part of the loss and the figures."""
    trainer = build_trainer(rank, world_size, folder, overrides)
    batches, told = iter(trainer.loader), []
    for step in range(1, STEPS + 1):
        loss, norm = trainer.train_step(batches)
        assert bool(trainer.update_ratios) == (step in (1, 2, 4)), "weights are copied before logged steps only"
        if trainer.update_ratios:
            told.append((loss.item(), log_step(trainer, loss, norm)))
    return told


def run(world_size: int, *overrides: str) -> list[list[tuple[float, dict]]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(log_steps, world_size, folder, (*DROPOUT, *overrides))


def comparable(figures: dict[str, float]) -> dict[str, float]:
    """Those that do not depend on clocks and on who did what."""
    kinds = ("loss", "grad_norm", "update_ratio", "samples_seen")
    return {name: value for name, value in figures.items() if name.split("/")[0] in kinds}


@pytest.fixture(scope="module")
def one_process() -> list[dict[str, float]]:
    ((*steps,),) = run(1, BATCH(8))
    return [figures for _, figures in steps]


def test_figures_of_one_process(one_process):
    first, second, last = one_process
    modules = ("img_in", "txt_in", "time_in", "vector_in", "double_blocks", "single_blocks", "final_layer")
    assert {name for name in first if name.startswith("grad_norm/")} == {f"grad_norm/{module}" for module in modules}
    assert {"update_ratio/double_blocks", "update_ratio/single_blocks"} <= first.keys()
    assert {"loss/captioned", "loss/uncaptioned"} <= last.keys() and "mfu_percent" not in last
    assert all(1e-6 < second[f"update_ratio/{kind}_blocks"] < 0.1 for kind in ("double", "single"))
    for figures in one_process:
        squares = sum(figures[f"grad_norm/{module}"] ** 2 for module in modules)
        assert squares**0.5 == pytest.approx(figures["grad_norm"], rel=FIGURE_TOLERANCE)
        assert figures["loss_max"] == pytest.approx(figures["loss"], rel=FIGURE_TOLERANCE)
        assert figures["matmul_percent"] > 0 and 0 < figures["encode_percent"] < 100
    by_time = [value for name, value in second.items() if name.startswith("loss/t=")]
    assert min(by_time) < second["loss"] < max(by_time)


@pytest.mark.parametrize("name", [pytest.param(row, marks=[] if row in QUICK else pytest.mark.slow) for row in ROWS])
def test_a_layout_tells_the_figures_of_one_process(one_process, name):
    processes, options = ROWS[name]
    ranks = run(processes, *options)
    steps = [[figures for _, figures in rank] for rank in ranks]
    for figures, expected in zip(steps[0], one_process, strict=True):
        assert comparable(figures) == pytest.approx(comparable(expected), rel=FIGURE_TOLERANCE)
    for other in steps[1:]:
        for ours, theirs in zip(other, steps[0], strict=True):
            assert comparable(ours) == comparable(theirs), "ranks differ"
            assert ours["loss_max"] == theirs["loss_max"] and ours["memory_gib"] == theirs["memory_gib"]


@pytest.mark.parametrize(
    ("processes", "options", "groups"),
    [
        pytest.param(2, (BATCH(4),), [[0], [1]], id="fsdp 2"),
        pytest.param(4, (BATCH(4), CP(2)), [[0, 1], [2, 3]], id="fsdp 2 x cp 2", marks=pytest.mark.slow),
    ],
)
def test_the_largest_loss_is_that_of_the_rank_that_fares_worst(processes, options, groups):
    ranks = run(processes, *options)
    for step in range(3):
        own = [2 * sum(ranks[rank][step][0] for rank in group) for group in groups]  # shares of two make the mean
        told = ranks[0][step][1]
        assert told["loss_max"] == pytest.approx(max(own), rel=FIGURE_TOLERANCE)
        wrong = [min(own), sum(own) / 2, sum(own)]
        if len(groups[0]) > 1:
            wrong.append(2 * max(rank[step][0] for rank in ranks))  # a context parallel rank's part
        for other in wrong:
            assert told["loss_max"] != pytest.approx(other, rel=100 * FIGURE_TOLERANCE)


def test_control_other_samples_have_other_figures(one_process):
    ((*steps,),) = run(1, BATCH(8), "--debug.seed=1")
    told, expected = comparable(steps[-1][1]), comparable(one_process[-1])  # Adam's first step is the same for all
    for name in told.keys() & expected.keys() - {"samples_seen"}:
        assert told[name] != pytest.approx(expected[name], rel=10 * FIGURE_TOLERANCE), name
