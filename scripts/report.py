"""Shows one or more runs in a single HTML file: curves, pictures over time, and in what their configurations differ.

    python -m scripts.report outputs/run1 outputs/run2 --out report.html

The file needs no network and no other file: it can be mailed. What a run has not logged is left out.
"""

import argparse
import base64
import html
import io
import json
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from config.write import CONFIG_FILE
from runtime import exit_codes
from runtime.exit_record import RECORD_NAME, recorded_exit
from training.bad_samples import BAD_SAMPLES_NAME
from training.metrics import METRICS_NAME
from training.plots import read_metrics, running_mean, series

COLORS = [colormaps["tab10"](number)[:3] for number in range(10)]
GRID_SIDE = 768  # pixels; larger pictures are made smaller
ERROR = "mean squared error of the velocity"
AT_TIME, VALIDATED_AT_TIME = "loss/t=", "validation_loss/t="  # begin the names of the losses around one time
MOST_GRIDS = 12  # of a run; of more, so many spread over all of it


class Chart(NamedTuple):
    """One diagram with a curve of each run."""

    title: str
    unit: str
    figures: tuple[str, ...]  # names in the metrics, the later ones dashed; a run without any of them has no curve
    smooth: bool = False  # the running mean, with what was logged behind it
    log_scale: bool = False


CHARTS = (
    Chart("Training loss (dashed: of the rank with the largest)", ERROR, ("loss", "loss_max"), smooth=True),
    Chart("Validation loss (dashed: of the average)", ERROR, ("validation_loss", "validation_loss_ema")),
    Chart("Training loss with a caption (dashed: without)", ERROR, ("loss/captioned", "loss/uncaptioned"), smooth=True),
    Chart("CLIP score of the pictures (dashed: of the average)", "100 x cosine", ("clip_score", "clip_score_ema")),
    Chart("Gradient norm, before clipping", "", ("grad_norm",), smooth=True, log_scale=True),
    Chart(
        "Gradient norm of double blocks (dashed: of single blocks)",
        "",
        ("grad_norm/double_blocks", "grad_norm/single_blocks"),
        smooth=True,
        log_scale=True,
    ),
    Chart(
        "Update over weight of a double block (dashed: of a single block)",
        "ratio of norms",
        ("update_ratio/double_blocks", "update_ratio/single_blocks"),
        smooth=True,
        log_scale=True,
    ),
    Chart("Learning rate", "", ("lr",)),
    Chart("Throughput", "samples per second", ("samples_per_s",), smooth=True),
    Chart("Compute", "TFLOP/s of all processes", ("tflops",), smooth=True),
    Chart("Share of measured peak (dashed: of datasheet)", "%", ("matmul_percent", "mfu_percent"), smooth=True),
    Chart("Wait for data (dashed: encoders)", "% of the time", ("data_wait_percent", "encode_percent"), smooth=True),
    Chart("Peak memory, largest of all ranks", "GiB", ("memory_gib",)),
)


class Run(NamedTuple):
    """What is left of a run."""

    name: str
    folder: Path
    lines: list[dict[str, Any]]  # of metrics.jsonl
    config: dict[str, Any]  # flat: section.key -> value
    exit_record: dict[str, Any]

    def samples_at(self, steps: numpy.ndarray) -> numpy.ndarray:
        """Samples that were seen by those steps."""
        known, samples = series(self.lines, "samples_seen")
        return numpy.interp(steps, [0, *known], [0, *samples])


def read_run(folder: Path, name: str) -> Run:
    """
    Raises:
        ValueError: the folder is not one of a run.
    """
    metrics = folder / METRICS_NAME
    if not metrics.is_file():
        what = f"holds no {METRICS_NAME}" if folder.is_dir() else "is no folder"
        raise ValueError(f"{folder} {what}: name the folder of a run, such as outputs/tiny")
    lines = read_metrics(metrics)
    if not any("samples_seen" in line for line in lines):
        raise ValueError(f"{metrics} has no logged step yet: wait for the first one")
    return Run(name, folder, lines, _read_config(folder / CONFIG_FILE), _read_json(folder / RECORD_NAME))


def name_runs(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("a run is named twice: name each once")


def summarize(run: Run) -> dict[str, str]:
    """The rows of a run in the table at the top."""
    rows = {"flavor": str(run.config.get("model.flavor", "?")), "about": str(run.config.get("job.description", ""))}
    last = max(line["step"] for line in run.lines)
    samples = int(run.samples_at(numpy.array([last]))[0])
    planned = run.config.get("training.steps")
    rows["length"] = f"step {last:,}{f' of {planned:,}' if planned else ''}, {samples:,} samples"
    steps, losses = series(run.lines, "loss")
    if len(steps):
        rows["training loss, smoothed"] = f"{running_mean(losses)[-1]:.4f}"
    steps, losses = series(run.lines, "validation_loss")
    if len(steps):
        best = int(numpy.nanargmin(losses)) if numpy.isfinite(losses).any() else 0
        rows["validation loss"] = f"{losses[-1]:.4f} (least: {losses[best]:.4f} at step {int(steps[best]):,})"
    _, speeds = series(run.lines, "samples_per_s")
    if len(speeds):
        rows["throughput"] = f"{numpy.median(speeds):.3g} samples/s (median)"
    _, memory = series(run.lines, "memory_gib")
    if len(memory):
        rows["peak memory"] = f"{memory.max():.2f} GiB"
    bad = run.folder / BAD_SAMPLES_NAME
    if bad.is_file():
        rows["bad samples"] = f"{sum(1 for line in bad.read_text(errors='replace').splitlines() if line):,}"
    code, reason = run.exit_record.get("code"), run.exit_record.get("reason", "")
    rows["ended"] = "not yet, or without a word" if code is None else f"{reason} (code {code})"
    return rows


def draw_chart(chart: Chart, runs: Sequence[Run]) -> str | None:
    """As SVG; None where no run has logged its figures."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        color = COLORS[number % len(COLORS)]
        for style, name in zip(("-", "--"), chart.figures, strict=False):
            steps, values = series(run.lines, name)
            if not len(steps):
                continue
            samples = run.samples_at(steps)
            if chart.smooth:
                axes.plot(samples, values, color=color, alpha=0.25, linewidth=0.8)
            shown = running_mean(values) if chart.smooth else values
            marker = "o" if len(steps) < 50 and not chart.smooth else None
            label = run.name if style == "-" else None
            axes.plot(samples, shown, style, color=color, linewidth=1.6, marker=marker, markersize=3, label=label)
    if chart.log_scale and axes.lines and all((numpy.asarray(line.get_ydata()) > 0).any() for line in axes.lines):
        axes.set_yscale("log")
    return _finish(figure, "samples seen", chart.unit)


def draw_loss_by_time(runs: Sequence[Run], prefix: str, smooth: bool) -> str | None:
    """The last loss of each run by time, as SVG; None where none is known.

    Args:
        prefix: of the names in the metrics; the time follows.
        smooth: the running mean's end, for what few samples were measured for each line.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        names = {name for line in run.lines for name in line if name.startswith(prefix)}
        last = {}
        for name in names:
            losses = series(run.lines, name)[1]
            last[float(name.removeprefix(prefix))] = (running_mean(losses) if smooth else losses)[-1]
        if last:
            times = sorted(last)
            color = COLORS[number % len(COLORS)]
            axes.plot(times, [last[time] for time in times], "o-", color=color, markersize=3, label=run.name)
    return _finish(figure, "time, from the picture (0) to noise (1)", ERROR)


def _finish(figure: Figure, xlabel: str, ylabel: str) -> str | None:
    """A diagram as SVG; None: it has no curve."""
    (axes,) = figure.axes
    if not axes.lines:
        return None
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def find_differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Keys of the configuration that are not the same in all runs, with the value of each."""
    keys = sorted({key for run in runs for key in run.config})
    values = {key: [_show(run.config[key]) if key in run.config else "not set" for run in runs] for key in keys}
    return {key: shown for key, shown in values.items() if len(set(shown)) > 1}


def find_grids(run: Run) -> list[tuple[int, Path]]:
    """(step, picture), at most MOST_GRIDS, the last one among them."""
    folder = run.folder / str(run.config.get("validation.save_img_folder", "img"))
    found = sorted((int(path.stem.removeprefix("step-")), path) for path in folder.glob("step-*[0-9].png"))
    places = numpy.unique(numpy.linspace(0, len(found) - 1, min(MOST_GRIDS, len(found))).round().astype(int))
    return [found[place] for place in places]


def write_report(runs: Sequence[Run]) -> str:
    """The whole page."""
    names = [run.name for run in runs]
    summaries = [summarize(run) for run in runs]
    rows = {
        name: [one.get(name, "") for one in summaries]
        for name in dict.fromkeys(key for one in summaries for key in one)
    }
    parts = [_table(names, rows, swatches=True)]
    charts = [(chart.title, draw_chart(chart, runs)) for chart in CHARTS]
    charts[2:2] = [
        ("Training loss by time, at last", draw_loss_by_time(runs, AT_TIME, smooth=True)),
        ("Validation loss by time, at last", draw_loss_by_time(runs, VALIDATED_AT_TIME, smooth=False)),
    ]
    parts.append('<div class="charts">')
    parts += [f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>" for title, svg in charts if svg]
    parts.append("</div>")
    for run in runs:
        parts += _show_grids(run)
    if len(runs) > 1:
        differences = find_differences(runs)
        parts.append("<h2>Differences of the configurations</h2>")
        parts.append(_table(names, differences) if differences else "<p>There are none.</p>")
    title = html.escape(", ".join(names))
    return _PAGE.format(title=title, body="\n".join(parts))


def _show_grids(run: Run) -> Iterator[str]:
    grids = find_grids(run)
    if not grids:
        return
    yield f'<h2>Pictures of {html.escape(run.name)}</h2><div class="strip">'
    for step, path in grids:
        samples = int(run.samples_at(numpy.array([step]))[0])
        picture = _embed(path)
        if picture:
            yield f"<figure><figcaption>step {step:,}, {samples:,} samples</figcaption>"
            yield f'<img src="{picture}" alt=""></figure>'
    yield "</div>"


def _embed(path: Path) -> str | None:
    """A picture as a data URL; None: it is not whole."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            image = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    image.thumbnail((GRID_SIDE, GRID_SIDE))
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def _table(heads: Sequence[str], rows: Mapping[str, Iterable[str]], swatches: bool = False) -> str:
    def head(number: int, name: str) -> str:
        red, green, blue = (round(255 * part) for part in COLORS[number % len(COLORS)])
        mark = f'<span class="swatch" style="background:rgb({red},{green},{blue})"></span>' if swatches else ""
        return f"<th>{mark}{html.escape(name)}</th>"

    lines = ["<tr><th></th>" + "".join(head(number, name) for number, name in enumerate(heads)) + "</tr>"]
    for name, values in rows.items():
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _read_config(path: Path) -> dict[str, Any]:
    """Every key of a run's configuration by its full name; of one that cannot be read, nothing."""

    def flatten(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in table.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    try:
        return dict(flatten(tomllib.loads(path.read_text(encoding="utf-8")), ""))
    except (OSError, ValueError):
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222; }}
h1, h2 {{ font-weight: 600; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #ddd; }}
.swatch {{ display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .4em; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1.5rem; margin-top: 2rem; }}
.strip {{ display: flex; gap: 1rem; overflow-x: auto; padding-bottom: 1rem; }}
.strip figure {{ flex: none; }}
.strip img {{ display: block; width: 384px; image-rendering: auto; }}
figure {{ margin: 0; }}
figcaption {{ font-weight: 600; margin-bottom: .3rem; }}
svg {{ width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="folder of a run")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="(%(default)s)")
    return parser


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    names = name_runs(arguments.folders)
    runs = [read_run(folder, name) for folder, name in zip(arguments.folders, names, strict=True)]
    page = write_report(runs)
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out={arguments.out} cannot be written ({error.strerror}): name a file that can") from error
    print(f"{arguments.out}: {len(page) / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    with recorded_exit(0, {ValueError: exit_codes.CONFIG}):
        main(sys.argv[1:])
