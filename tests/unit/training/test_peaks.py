"""The measured ceiling and shares of it."""

import pytest
import torch

from training import peaks
from training.peaks import Peaks, measure_matmul

CPU = torch.device("cpu")


def test_shares_are_of_the_ceiling_and_of_the_datasheet():
    known = Peaks(matmul=6000.2468, datasheet=7912.0)
    assert known.shares(3956.0) == {"matmul_percent": pytest.approx(65.93, abs=0.01), "mfu_percent": 50}
    assert known.describe() == "6000.25 TFLOP/s in matrix products (datasheet: 7912 in bfloat16)"
    assert Peaks(0.1, None).shares(0.05) == {"matmul_percent": 50}, "no share of what is not known"
    assert Peaks(0.09412, None).describe() == "0.094 TFLOP/s in matrix products"


@pytest.fixture
def clock(monkeypatch) -> dict:
    """Products take the seconds that are given, in turns, on a clock that only they move."""
    state = {"now": 0.0, "takes": [0.04, 0.02, 0.03], "count": 0}
    monkeypatch.setattr(peaks.time, "perf_counter", lambda: state["now"])
    product = torch.mm

    def mm(*args, **kwargs):
        state["now"] += state["takes"][state["count"] % 3]
        state["count"] += 1
        return product(*args, **kwargs)

    monkeypatch.setattr(peaks.torch, "mm", mm)
    return state


def test_the_ceiling_is_that_of_the_fastest_product(clock, monkeypatch):
    monkeypatch.setitem(peaks.SIDES, "cpu", 100)
    assert measure_matmul(CPU, torch.float32) == pytest.approx(2 * 100**3 / 0.02 / 1e12)
    assert 3 <= clock["count"] < 10, "it ends"


def test_a_slow_machine_multiplies_twice(clock, monkeypatch):
    monkeypatch.setitem(peaks.SIDES, "cpu", 10)
    clock["takes"] = [60.0, 50.0, 1.0]
    measure_matmul(CPU, torch.float32)
    assert clock["count"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_numbers_are_multiplied_in_the_dtype_and_no_random_state_moves(dtype, monkeypatch):
    monkeypatch.setitem(peaks.SIDES, "cpu", 16)
    factors, product = [], torch.mm
    monkeypatch.setattr(peaks.torch, "mm", lambda *args, **kwargs: (factors.append(args), product(*args, **kwargs))[1])
    before = torch.get_rng_state()
    measured = measure_matmul(CPU, dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 < measured < 1e3
    for factor in factors[0]:
        assert factor.dtype is dtype and factor.float().std() > 0.5
