"""Checkpoint folders by name: what is seen, what is hidden, what may go."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.steps import (
    find_expired,
    find_steps,
    most_at_once,
    publish,
    remove_expired,
    remove_unfinished,
    set_aside,
    step_path,
    unfinished_path,
)


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "content").write_text(name)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_whole_names_are_steps_and_they_are_in_order_of_number(tmp_path):
    others = ("old-step-5-bak", "step-5-bak", "step-", "step--1", "step-07", "step-1.5", "Step-3", ".unfinished-step-9")
    make(tmp_path, "step-10", "step-9", "step-0", "step-100", *others, "damaged-step-11", ".expired-step-2", "step-٣")
    assert list(find_steps(tmp_path)) == [0, 9, 10, 100]
    assert find_steps(tmp_path)[9] == step_path(tmp_path, 9) == tmp_path / "step-9"


def test_a_folder_that_is_missing_has_no_steps(tmp_path):
    assert find_steps(tmp_path / "nothing") == {}


def test_what_is_unfinished_is_hidden_until_it_is_published(tmp_path):
    final = step_path(tmp_path, 5)
    make(tmp_path, unfinished_path(final).name)
    assert find_steps(tmp_path) == {}
    publish(final)
    assert find_steps(tmp_path) == {5: final} and names(tmp_path) == {"step-5"}


@pytest.mark.parametrize("there", ["full", "empty"])
def test_a_step_is_never_overwritten(tmp_path, there):
    final = step_path(tmp_path, 5)
    make(tmp_path, unfinished_path(final).name)
    final.mkdir()
    if there == "full":
        (final / "content").write_text("the first")
    before = names(final)
    with pytest.raises(FileExistsError, match="step-5 exists already"):
        publish(final)
    assert names(final) == before


def test_leftovers_are_cleared_and_nothing_else(tmp_path):
    stay = {"step-1", "damaged-step-2", "my notes", ".hidden"}
    make(tmp_path, *stay, ".unfinished-step-3", ".expired-step-0")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == stay


def test_damaged_ones_are_set_aside_beside_each_other(tmp_path):
    for number in ("", "-2", "-3"):
        make(tmp_path, "step-5")
        assert set_aside(step_path(tmp_path, 5)).name == f"damaged-step-5{number}"
    assert find_steps(tmp_path) == {}


steps = st.sets(st.integers(0, 60))


@given(steps, st.integers(0, 6), st.integers(0, 7))
def test_the_latest_and_the_permanent_ones_stay(there, latest, every):
    expired = find_expired(there, latest, every)
    kept = there - set(expired)
    if latest:
        assert kept >= set(sorted(there)[-latest:])
    else:
        assert kept == there
    assert kept >= {step for step in there if every and step % every == 0}
    # And nothing else stays.
    spare = [step for step in kept if not (every and step % every == 0)]
    assert latest == 0 or len(spare) <= latest


@given(steps, st.integers(0, 6), st.integers(0, 7))
def test_most_at_once_is_what_a_folder_sees(saved, latest, every):
    there, most = set(), 0
    for step in sorted(saved):
        there.add(step)
        most = max(most, len(there))
        there -= set(find_expired(there, latest, every))
    assert most_at_once(saved, latest, every) == most


def test_expired_ones_are_deleted(tmp_path):
    make(tmp_path, *(f"step-{step}" for step in range(1, 11)), "damaged-step-0")
    remove_expired(tmp_path, keep_latest_k=2, keep_every=4)
    assert names(tmp_path) == {"step-4", "step-8", "step-9", "step-10", "damaged-step-0"}
