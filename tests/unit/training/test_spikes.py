"""Spikes: what is one, what it leaves behind for the updates after it, and a watch that goes on after a resume."""

import json
import math

import pytest
import torch

from tests.unit.training.unread import Unread
from training.spikes import MIN_SPREAD, WINDOW, SpikeWatch

CPU, SIGMA = torch.device("cpu"), 6.0


def make_series(length: int, seed: int = 0) -> list[tuple[float, float]]:
    """Loss and gradient norm of a run that goes well: both fall, with 5 % and 20 % of noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(length, 2, generator=generator) * torch.tensor([0.05, 0.2])
    fall = 0.5 + torch.exp(-torch.arange(length) / 150)
    return [(loss, norm) for loss, norm in (fall[:, None] * (1 + noise).clamp(min=0.1)).tolist()]


def judge(watch: SpikeWatch, loss: float, norm: float) -> bool:
    return bool(watch.judge(torch.tensor(loss), torch.tensor(norm))[0])


def spikes(series: list[tuple[float, float]], watch: SpikeWatch | None = None) -> list[int]:
    """Where they are."""
    watch = watch or SpikeWatch(SIGMA, CPU)
    return [place for place, pair in enumerate(series) if judge(watch, *pair)]


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_goes_well_has_none(seed):
    series = make_series(1500, seed)
    assert spikes(series) == []
    assert spikes(series, SpikeWatch(1.5, CPU)) != []  # control


@pytest.mark.parametrize("which", [0, 1])
def test_one_that_is_a_thousand_times_as_large_is_caught(which):
    series = make_series(600)
    for place in (300, 301, 420):
        series[place] = tuple(value * (1000 if number == which else 1) for number, value in enumerate(series[place]))
    # It hides no other, and what follows is judged as before.
    assert spikes(series) == [300, 301, 420]
    early = make_series(300)
    early[WINDOW - 1] = (1e3, 1e3)
    assert spikes(early) == [], "there was no full window yet"


def test_the_limit_is_sigma_deviations_above_the_mean():
    series = make_series(WINDOW)
    losses = torch.tensor(series)[:, 0].double()
    limit = (losses.mean() + SIGMA * losses.std()).item()
    for factor, wanted in ((0.999, False), (1.001, True)):
        watch = SpikeWatch(SIGMA, CPU)
        spikes(series, watch)
        spike, expected = watch.judge(torch.tensor(limit * factor), torch.tensor(0.5))
        assert bool(spike) is wanted
        assert expected[0].tolist() == pytest.approx([losses.mean().item(), losses.std().item()], rel=1e-12)
    assert spikes([*series, (-1e6, 1e-6), (0.0, 0.0)]) == [], "downwards is no spike"


def test_where_all_is_alike_the_last_digit_is_no_spike():
    same = [(1.0, 1.0)] * WINDOW
    assert spikes([*same, (1 + 0.9 * SIGMA * MIN_SPREAD, 1.0)]) == []
    assert spikes([*same, (1 + 1.1 * SIGMA * MIN_SPREAD, 1.0)]) == [WINDOW]


@pytest.mark.parametrize("factor", [2, 1000])
def test_a_loss_that_has_risen_for_good_is_no_spike_forever(factor):
    series = make_series(1000)
    risen = series[:500] + [(loss * factor, norm) for loss, norm in series[500:]]
    found = spikes(risen)
    assert found == list(range(500, 500 + len(found))) and 0 < len(found) < WINDOW


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_no_spike_and_leaves_nothing(bad):
    series, watch, other = make_series(200), SpikeWatch(SIGMA, CPU), SpikeWatch(SIGMA, CPU)
    for watched in (watch, other):
        spikes(series, watched)
    assert not judge(watch, bad, 0.5) and not judge(watch, 0.5, bad)
    assert watch.state() == other.state() and len(watch.state()) == WINDOW
    assert judge(watch, 1e3, 0.5)


@pytest.mark.parametrize("stop", [0, 50, WINDOW, 400])
def test_a_resumed_watch_judges_by_the_same_bits(stop):
    series, straight = make_series(700), SpikeWatch(SIGMA, CPU)
    series[300] = (1e3, 0.5)

    def run(watch: SpikeWatch, part: list[tuple[float, float]]) -> list[list[float]]:
        return [watch.judge(*map(torch.tensor, pair))[1].flatten().tolist() for pair in part]

    wanted = run(straight, series)[stop:]
    first, resumed = SpikeWatch(SIGMA, CPU), SpikeWatch(SIGMA, CPU)
    run(first, series[:stop])
    resumed.load(json.loads(json.dumps(first.state())))
    assert str(run(resumed, series[stop:])) == str(wanted)  # as text, in which NaN is NaN
    assert resumed.state() == straight.state()
    if stop:
        empty = SpikeWatch(SIGMA, CPU)
        assert str(run(empty, series[stop:])) != str(wanted)  # control


def test_zero_is_off():
    watch = SpikeWatch(0.0, CPU)
    assert spikes([*make_series(200), (1e6, 1e6)], watch) == [] and watch.state() == []


def test_nothing_waits_for_the_device():
    loss, norm = torch.tensor(1.0), torch.tensor(2.0)
    watch = SpikeWatch(SIGMA, CPU)
    with Unread():
        for _ in range(WINDOW + 2):
            spike, expected = watch.judge(loss, norm)
    assert spike.shape == () and expected.tolist() == [[1.0, 0.0], [2.0, 0.0]]
    with pytest.raises(AssertionError, match="waits for the device"), Unread():
        assert spike  # control
