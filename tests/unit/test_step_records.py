"""How a step that is computed once more compares with what the run has recorded."""

import math

import pytest

from step_records import Figures, Sample, compare, compare_incident, compare_logged, explain

LAYOUT = "2 ranks = dp_shard 2, nccl on cuda"
FIGURES = Figures(losses=[0.5, math.nan], loss=math.nan, logged_loss=math.nan, grad_norm=math.inf)
SAMPLES = [Sample(4, "b", 0.5, math.nan, 1), Sample(3, "a", 0.5, 1.0, 0)]
INCIDENT = {
    "loss": "nan",
    "grad_norm": "inf",
    "layout": LAYOUT,
    "ranks": [
        {"rank": 0, "host": "x", "loss": 0.5, "samples": [[3, "a"]]},
        {"rank": 1, "host": "y", "loss": "nan", "samples": [[4, "b"]]},
    ],
}


@pytest.mark.parametrize(("here", "then"), [(1.5, 1.5), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_equal_numbers(here, then):
    assert compare([("loss", here, then)]) == []


@pytest.mark.parametrize(
    ("here", "then", "told"),
    [
        (1.0, math.nextafter(1.0, 2), "(relative difference 2.2e-16)"),
        (1.0, "nan", "loss is 1.0 and was nan"),
        (math.nan, 1.0, "loss is nan and was 1.0"),
        (math.inf, "-inf", "loss is inf and was -inf"),
        (0.0, 1.0, "(relative difference 1.0e+00)"),
    ],
)
def test_other_numbers(here, then, told):
    assert compare([("loss", here, then)])[0].endswith(told)


def test_a_logged_step():
    figures = Figures([1.0], 1.0000000001, 1.0, 2.0)
    assert compare_logged(figures, {"loss": 1.0, "grad_norm": 2.0}) == []
    assert compare_logged(figures, {"loss": 1.0, "grad_norm": 2.5})[0].startswith("grad_norm is 2.0 and was 2.5")


def test_an_incident():
    assert compare_incident(FIGURES, SAMPLES, INCIDENT, LAYOUT) == ([], [])


def test_an_incident_of_which_one_rank_knows():
    texts, ranks = compare_incident(FIGURES._replace(losses=[0.5, 0.5], loss=1.0), SAMPLES, INCIDENT, LAYOUT)
    assert texts == ["loss is 1.0 and was nan", "loss of rank 1 is 0.5 and was nan"] and ranks == ["rank 1 on y"]


def test_losses_of_ranks_are_of_one_layout():
    figures = FIGURES._replace(losses=[math.nan])
    assert compare_incident(figures, SAMPLES, INCIDENT, "1 process on cuda") == ([], [])


def test_another_sample():
    texts, _ = compare_incident(FIGURES, [SAMPLES[0], SAMPLES[1]._replace(name="c")], INCIDENT, LAYOUT)
    assert texts == ["the sample at position 3 is another one (2 differences)"]


@pytest.mark.parametrize(
    ("layout", "changes", "is_exact", "first", "told"),
    [
        ("1 process on cpu", [], True, None, f"made by {LAYOUT}, and replayed by 1 process on cpu: sums"),
        (LAYOUT, ["torch 1 -> 2"], True, None, "other versions may compute otherwise: torch 1 -> 2"),
        (LAYOUT, [], False, None, "without debug.deterministic a GPU"),
        (LAYOUT, [], True, None, "the same samples, weights and layout do not give"),
        (LAYOUT, [], True, 7, "step 7 differs already, as the first one: the same samples"),
    ],
)
def test_what_a_difference_means(layout, changes, is_exact, first, told):
    assert explain(layout, LAYOUT, changes, is_exact, [], first).startswith(told)


def test_who_is_to_be_suspected():
    assert explain(LAYOUT, LAYOUT, [], True, ["rank 1 on y"], None).endswith("suspect the hardware of rank 1 on y")
    assert explain(LAYOUT, LAYOUT, [], True, [], None).endswith("suspect the hardware of the run")
