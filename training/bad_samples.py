"""Keeps account of samples that could not be used: how many, which ones, and when there are too many."""

import json
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.metrics import drop_lines_after

BAD_SAMPLES_NAME = "bad_samples.jsonl"  # in the run folder
WINDOW = 10_000  # samples over which their share counts


class BadSamples:
    """The bad samples of a run. One process of a run makes one.

    Args:
        folder: the run folder.
        max_fraction: largest share of bad samples among the last WINDOW.
        done: positions that earlier parts of the run have used; what was noted of later ones will be noted again.
    """

    def __init__(self, folder: Path, max_fraction: float, done: int):
        self.path = folder / BAD_SAMPLES_NAME
        self.max_fraction = max_fraction
        drop_lines_after(self.path, done - 1, "position")
        self._recent: deque[tuple[int, Counter[str]]] = deque()  # samples, and bad ones by shard, of each report

    def note(self, samples: int, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Writes down what was bad among the last `samples` samples.

        Args:
            samples: of the whole run since the last call.
            records: a mapping for each bad one, with "position", "reason", "shard" and what else there is to say.

        Returns:
            Figures for the metrics, nothing where nothing was bad.
        """
        if records:
            with self.path.open("a", encoding="utf-8") as file:
                for record in sorted(records, key=lambda record: (record["position"], record.get("attempt", 0))):
                    file.write(json.dumps(record) + "\n")
        self._recent.append((samples, Counter(record["shard"] for record in records)))
        while sum(samples for samples, _ in self._recent) - self._recent[0][0] >= WINDOW:
            self._recent.popleft()
        reasons = Counter(record["reason"] for record in records)
        return {f"bad_samples/{reason}": float(count) for reason, count in sorted(reasons.items())}

    def complaint(self) -> str:
        """What to say when there are too many; empty: there are not."""
        seen = max(WINDOW, sum(samples for samples, _ in self._recent))
        shards = _total(shards for _, shards in self._recent)
        bad = shards.total()
        if bad <= self.max_fraction * seen:
            return ""
        worst, count = shards.most_common(1)[0]
        where = f"{count} of them in {worst}" if worst else "see their keys"
        return (
            f"{bad} of the last {seen:,} samples are bad, {where}: data.max_bad_fraction={self.max_fraction:g} allows "
            f"{int(self.max_fraction * seen)}. {self.path} names each: mend the data, or raise data.max_bad_fraction"
        )


def _total(counters: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total
