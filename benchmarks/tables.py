"""Makes the tables of benchmarks/README.md from what `benchmarks.train_step --json` wrote.

    python -m benchmarks.train_step --against naive diffusers --json benchmarks/results/tiny_cpu.json
    python -m benchmarks.tables

Every file of benchmarks/results is a row, under the machine on which it was measured. What stands between the marks in
the page is replaced.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- made by benchmarks.tables -->\n", "<!-- end -->"
COLUMNS = {
    "flavor, layout": "",
    "update x (image + text tokens)": "",
    "computes in": "",
    "recompute": "",
    "compile": "",
    "s/update": "---:",
    "samples/s": "---:",
    "TFLOP/s": "---:",
    "of matmul, datasheet": "---:",
    "peak (plan), GiB": "---:",
    "time of naive's": "---:",
    "transformer's time of diffusers'": "---:",
    "commit": "",
}


def make_tables(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one table for each machine, in the order of the results."""
    machines: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        machines.setdefault(f"{result['hardware']}, torch {result['torch']}", []).append(result)
    tables = []
    for machine, rows in machines.items():
        lines = [f"{machine}:", "", *_header(), *(_line(_cells(row)) for row in rows)]
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _header() -> Iterator[str]:
    yield _line(COLUMNS)
    yield _line(rule or "---" for rule in COLUMNS.values())


def _line(cells: Iterator[str] | Mapping[str, str] | Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(result: Mapping[str, Any]) -> list[str]:
    update = result["steps"].get("update")
    dtype = result["dtype"] if result["dtype"] == result["weights"] else f"{result['dtype']}, weights float32"
    tokens = f"({result['image_tokens']} + {result['text_tokens']})"
    cells = [
        f"{result['flavor']}, {result['layout']}",
        f"{result['samples']} x {tokens}" + (", pictures" if result["inputs"] == "pictures" else ""),
        dtype,
        result["recompute"],
        "yes" if result["compile"] else "no",
    ]
    if update:
        datasheet = "" if update["mfu_percent"] is None else f", {update['mfu_percent']:.1f} %"
        peak = f"{update['peak_gib']:.1f} ({result['plan_gib']:.1f})" if update["peak_gib"] else ""
        cells += [
            f"{update['seconds']:.3g}",
            f"{update['samples_per_s']:.3g}",
            f"{update['tflops']:.3g}",
            f"{update['matmul_percent']:.1f} %{datasheet}",
            peak,
        ]
    else:
        cells += [""] * 5
    cells += [_ratio(result, "update / naive"), _ratio(result, "transformer / diffusers"), result["commit"] or ""]
    return cells


def _ratio(result: Mapping[str, Any], name: str) -> str:
    if name not in result["ratios"]:
        return ""
    low, middle, high = result["ratios"][name]
    return f"{middle:.3f} ({low:.3f} .. {high:.3f})"


def insert(page: str, tables: str) -> str:
    """The page with the tables between its marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(
            f"the page must hold the lines {BEGIN.strip()!r} and {END!r}: put them where the tables belong"
        )
    return f"{before}{begin}{tables}{end}{after}"


def read_results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    page = FOLDER / "README.md"
    results = read_results(FOLDER / "results")
    page.write_text(insert(page.read_text(), make_tables(results)))
    print(f"{len(results)} results are in {page}")


if __name__ == "__main__":
    main()
