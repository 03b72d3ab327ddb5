"""Account of samples that could not be used: counted by reason, written down once, and a limit to their share."""

import json

import pytest

from training.bad_samples import BAD_SAMPLES_NAME, WINDOW, BadSamples


def record(position: int, reason: str = "damaged", shard: str = "a.tar") -> dict:
    return {"position": position, "attempt": 0, "reason": reason, "shard": shard, "key": f"k{position}", "detail": "x"}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / BAD_SAMPLES_NAME).read_text().splitlines()]


def test_counted_by_reason_and_written_in_order_of_position(tmp_path):
    account = BadSamples(tmp_path, 0.01, 0)
    assert account.note(64, [[]]) == {}
    assert not (tmp_path / BAD_SAMPLES_NAME).exists()
    values = account.note(64, [[record(90)], [], [record(70, "no_caption"), record(80)]])
    assert values == {"bad_samples/damaged": 2, "bad_samples/no_caption": 1}
    assert [line["position"] for line in lines(tmp_path)] == [70, 80, 90]
    assert lines(tmp_path)[0] == record(70, "no_caption")


def test_a_run_that_goes_on_notes_nothing_twice(tmp_path):
    BadSamples(tmp_path, 0.01, 0).note(64, [[record(10), record(40), record(63)]])
    account = BadSamples(tmp_path, 0.01, 40)  # positions 0 to 39 are done
    assert [line["position"] for line in lines(tmp_path)] == [10]
    account.note(24, [[record(40), record(63)]])
    assert [line["position"] for line in lines(tmp_path)] == [10, 40, 63]


def test_complains_when_more_than_the_share_of_a_window_is_bad(tmp_path):
    account = BadSamples(tmp_path, 0.01, 0)
    account.note(200, [[record(place, shard="b.tar" if place % 4 else "a.tar") for place in range(100)]])
    assert account.complaint() == "", "100 of 10,000 are allowed, wherever they lie"
    account.note(100, [[record(250, shard="b.tar")]])
    assert account.complaint().startswith(
        "101 of the last 10,000 samples are bad, 76 of them in b.tar: data.max_bad_fraction=0.01 allows 100."
    )


@pytest.mark.parametrize("interval", [100, 1000, 2 * WINDOW])
def test_what_is_long_ago_does_not_count(tmp_path, interval):
    account = BadSamples(tmp_path, 0.01, 0)
    for start in range(0, 4 * WINDOW, interval):
        account.note(interval, [[record(start + place) for place in range(interval // 100)]])
        assert account.complaint() == ""
    account.note(interval, [[record(place) for place in range(interval // 100 + 1)]])
    assert account.complaint()


def test_no_bad_sample_at_all_may_be_asked_for(tmp_path):
    account = BadSamples(tmp_path, 0.0, 0)
    account.note(64, [[]])
    assert account.complaint() == ""
    account.note(64, [[record(70, shard="")]])
    assert "1 of the last 10,000 samples are bad, see their keys" in account.complaint()


def test_a_run_that_is_restarted_often_complains_too(tmp_path):
    """Five in a hundred are bad, and every part of the run has 2000 samples."""
    complaints = []
    for start in range(0, 8000, 2000):
        account = BadSamples(tmp_path, 0.01, start)
        account.note(2000, [[record(start + place) for place in range(0, 2000, 20)]])
        complaints.append(bool(account.complaint()))
    assert complaints == [False, True, True, True]


def test_ranks_that_share_samples_must_meet_the_same_bad_ones(tmp_path):
    account = BadSamples(tmp_path, 0.01, 0)
    assert account.note(64, [[record(1)], [record(1)], [record(9)], [record(9)]], sharing=2) == {
        "bad_samples/damaged": 2
    }
    assert account.complaint() == "" and [line["position"] for line in lines(tmp_path)] == [1, 9]
    account.note(64, [[record(70)], [], [], []], sharing=2)
    assert account.complaint().startswith("ranks that share samples did not read the same ones")
