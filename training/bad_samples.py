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
        self._differ = False
        # Samples, and bad ones by shard, of each report; a run that goes on begins with those of its last window.
        lately = min(done, WINDOW)
        self._recent: deque[tuple[int, Counter[str]]] = deque([(lately, self._count_since(done - lately))])

    def note(self, samples: int, by_rank: Sequence[Sequence[Mapping[str, Any]]], sharing: int = 1) -> dict[str, float]:
        """Writes down what was bad among the last `samples` samples.

        Args:
            samples: of the whole run since the last call.
            by_rank: of every rank, a mapping for each bad sample: "position", "attempt", "reason", "shard", and more.
            sharing: so many neighboring ranks work on the same samples, and must have met the same bad ones.

        Returns:
            Figures for the metrics, nothing where nothing was bad.
        """
        records = [record for of_rank in by_rank[::sharing] for record in of_rank]
        positions = [sorted((record["position"], record["attempt"]) for record in of_rank) for of_rank in by_rank]
        self._differ = any(positions[rank] != positions[rank - rank % sharing] for rank in range(len(positions)))
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
        """What to say when there are too many, or not the same on all ranks; empty: all is well."""
        if self._differ:
            return (
                "ranks that share samples did not read the same ones, since some of them failed on one rank only: "
                f"{self.path} names those of the others; look for a disk or network that fails now and then, and go on "
                "from the last checkpoint"
            )
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

    def _count_since(self, position: int) -> Counter[str]:
        if not self.path.exists():
            return Counter()
        records = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return Counter(record["shard"] for record in records if record["position"] >= position)


def _total(counters: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total
