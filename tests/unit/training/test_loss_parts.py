"""Parts of the loss: which sample is where, what ranks add up to, and what a rank alone fares like."""

import math

import pytest
import torch

from tests.unit.training.unread import Unread
from training.loss_parts import TIME_BINS, LossParts

FLOAT32_ROUNDING = 1e-7  # relative, of one number
CPU = torch.device("cpu")
LOSS = torch.tensor(0.75)


MADE, SKIPPED = torch.zeros(()), torch.ones(())
Samples = list[tuple[float, float, bool, float]]  # (loss, time, uncaptioned, counts)


def fill(parts: LossParts, *batches: Samples, skip: torch.Tensor = MADE) -> LossParts:
    """Adds one update."""
    parts.begin_update()
    for samples in batches:
        losses, times, uncaptioned, counts = zip(*samples, strict=True)
        parts.add(torch.tensor(losses), torch.tensor(times), torch.tensor(uncaptioned), torch.tensor(counts))
    parts.end_update(skip)
    return parts


def figures(ranks: list[list[LossParts]], losses: list[list[float]]) -> dict[str, float]:
    """Of dp x cp ranks."""
    read = [
        torch.stack([parts.read(torch.tensor(loss)) for parts, loss in zip(group, values, strict=True)])
        for group, values in zip(ranks, losses, strict=True)
    ]
    return LossParts(CPU, by_caption=True).summarize(torch.stack(read))


def test_bins_are_named_by_their_middles_and_hold_their_lower_end():
    parts = LossParts(CPU, by_caption=True)
    edges = [(1.0, 0.0, False, 1.0), (3.0, 0.1249, False, 1.0), (5.0, 0.125, False, 1.0), (7.0, 1.0, False, 1.0)]
    told = figures([[fill(parts, edges)]], [[4.0]])
    assert {name: value for name, value in told.items() if "t=" in name} == {
        "loss/t=0.0625": 2.0,
        "loss/t=0.1875": 5.0,
        "loss/t=0.9375": 7.0,
    }
    assert told["loss/captioned"] == 4 and "loss/uncaptioned" not in told and told["loss"] == 4


def test_names_are_those_of_validation():
    from flux.data.dataset import TIME_STEPS

    assert TIME_BINS == TIME_STEPS


def test_samples_without_a_caption_are_told_apart():
    samples = [(1.0, 0.5, False, 1.0), (2.0, 0.5, True, 1.0), (4.0, 0.5, True, 1.0)]
    told = figures([[fill(LossParts(CPU, by_caption=True), samples)]], [[0.0]])
    assert (told["loss/captioned"], told["loss/uncaptioned"], told["loss/t=0.5625"]) == (1, 3, pytest.approx(7 / 3))
    never_dropped = fill(LossParts(CPU, by_caption=False), samples[:1])
    assert set(never_dropped.summarize(never_dropped.read(LOSS)[None, None])) == {"loss", "loss/t=0.5625", "loss_max"}


def test_parts_are_of_all_samples_since_the_last_line_and_the_largest_loss_of_the_last_update():
    parts = LossParts(CPU, by_caption=True)
    fill(parts, [(8.0, 0.5, False, 1.0)])
    fill(parts, [(1.0, 0.5, False, 1.0)], [(3.0, 0.5, True, 1.0)])
    told = figures([[parts]], [[2.0]])
    assert told["loss/t=0.5625"] == 4 and told["loss_max"] == 2
    fill(parts, [(5.0, 0.5, False, 1.0)])
    assert figures([[parts]], [[5.0]])["loss/t=0.5625"] == 5, "what was told is forgotten"


@pytest.mark.parametrize("loss", [math.nan, math.inf, 4e3])
def test_an_update_that_was_left_out_is_in_no_mean(loss):
    def run(skip: torch.Tensor) -> dict[str, float]:
        parts = LossParts(CPU, by_caption=True)
        fill(parts, [(1.0, 0.5, False, 1.0), (2.0, 0.1, True, 1.0)])
        with Unread():
            parts.begin_update()
            for _ in range(2):
                parts.add(torch.tensor([loss]), torch.tensor([0.5]), torch.tensor([False]), None)
            parts.end_update(skip)
        fill(parts, [(5.0, 0.5, False, 1.0)])
        return figures([[parts]], [[5.0]])

    told, without = run(SKIPPED), LossParts(CPU, by_caption=True)
    fill(without, [(1.0, 0.5, False, 1.0), (2.0, 0.1, True, 1.0)])
    assert told == figures([[fill(without, [(5.0, 0.5, False, 1.0)])]], [[5.0]])
    assert told["loss/t=0.5625"] == 3 and told["loss_max"] == 5
    assert not run(MADE)["loss/t=0.5625"] < 1e3  # control


def test_the_last_update_is_looked_at_even_when_it_was_left_out():
    parts = fill(LossParts(CPU, by_caption=True), [(1.0, 0.5, False, 1.0)])
    told = figures([[fill(parts, [(6.0, 0.1, False, 1.0), (8.0, 0.5, False, 1.0)], skip=SKIPPED)]], [[7.0]])
    assert told == {"loss": 7, "loss/t=0.5625": 1, "loss/captioned": 1, "loss_max": 7}
    assert figures([[fill(parts, [(3.0, 0.5, False, 1.0)], skip=SKIPPED)]], [[3.0]]) == {"loss": 3, "loss_max": 3}


def test_what_only_fills_up_a_batch_does_not_count():
    samples = [(1.0, 0.5, True, 1.0), (0.0, 0.5, True, 0.0), (math.nan, 0.9, False, 0.0)]
    told = figures([[fill(LossParts(CPU, by_caption=True), samples)]], [[1.0]])
    assert told == {"loss": 1, "loss/t=0.5625": 1, "loss/uncaptioned": 1, "loss_max": 1}
    all_count = [(loss, time, dropped, 1.0) for loss, time, dropped, _ in samples]
    assert "loss/t=0.9375" in figures([[fill(LossParts(CPU, by_caption=True), all_count)]], [[1.0]])


def rank(*losses: float, counts: float = 1.0) -> LossParts:
    return fill(LossParts(CPU, by_caption=True), [(loss, 0.5, False, counts) for loss in losses])


def test_ranks_add_up_and_the_largest_loss_is_one_ranks_own():
    told = figures([[rank(1.0, 3.0)], [rank(5.0, 9.0)], [rank(2.0, 2.0)]], [[0.5], [1.5], [0.25]])
    assert told["loss/t=0.5625"] == pytest.approx(22 / 6) and told["loss"] == 2.25
    assert told["loss_max"] == 7  # neither the mean, 22 / 6, nor the sum, 13


def test_context_parallel_ranks_have_parts_of_the_same_samples():
    told = figures([[rank(1.0, 2.0), rank(3.0, 4.0)], [rank(6.0, 0.0), rank(0.0, 0.0)]], [[0.1, 0.2], [0.3, 0.4]])
    assert told["loss/t=0.5625"] == 4 and told["loss"] == 1
    assert told["loss_max"] == 5  # of the first group together; the largest of a rank alone is 3.5


def test_a_rank_whose_samples_only_fill_up_has_no_loss_of_its_own():
    told = figures([[rank(2.0)], [rank(0.0, counts=0.0)]], [[2.0], [0.0]])
    assert told["loss_max"] == 2


def test_a_rank_that_diverges_is_seen():
    assert math.isnan(figures([[rank(2.0)], [rank(math.nan)]], [[1.0], [math.nan]])["loss_max"])


def test_sums_do_not_lose_small_losses():
    parts = LossParts(CPU, by_caption=True)
    for _ in range(1000):
        fill(parts, [(0.1, 0.5, False, 1.0)] * 32)
    in_float32 = sum(torch.full((1000,), 3.2), start=torch.tensor(0.0)).item() / 32_000
    told = figures([[parts]], [[0.1]])["loss/t=0.5625"]
    assert told == pytest.approx(0.1, rel=FLOAT32_ROUNDING)
    assert in_float32 != pytest.approx(0.1, rel=FLOAT32_ROUNDING)
