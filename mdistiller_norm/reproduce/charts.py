"""Learning curves as inline SVG, drawn by matplotlib."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from mdistiller_norm.reproduce.ledger import Entry

_STYLE = Path(__file__).with_suffix(".mplstyle")
_TEXT = "#010203"  # the text colour of the style


def line_chart(title: str, lines: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """Return an SVG element with a line for each label and its values by epoch.

    Lines of one label share a colour and an entry in the legend.
    """
    numbers: dict[str, int] = {}
    with mpl.rc_context(fname=_STYLE):
        figure = Figure(figsize=(7.2, 3))
        axes = figure.add_axes((0.07, 0.14, 0.63, 0.76), title=title, xlabel="epoch")
        for label, values in lines:
            shown = f"_{label}" if label in numbers else label  # "_": not in the legend
            number = numbers.setdefault(label, len(numbers))
            style = "." if len(values) == 1 else "-" if number < 10 else "--"
            axes.plot(
                range(1, len(values) + 1), values, style, color=f"C{number % 10}", label=shown
            )
        axes.legend(bbox_to_anchor=(1, 1.03))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().replace(_TEXT, "currentColor")
    return Markup(
        text[text.index("<svg") :].replace("<svg ", '<svg class="chart" role="img" ', 1)
    )


def run_charts(runs: Mapping[int, Entry]) -> list[Markup]:
    """Return charts of the test top-1 and of the losses of some runs by seed."""
    metrics = {seed: entry.record["metrics"] for seed, entry in sorted(runs.items())}
    accuracy = [(f"seed {seed}", values["test_top1"]) for seed, values in metrics.items()]
    losses = [item for values in metrics.values() for item in values.items() if "loss" in item[0]]
    return [line_chart("Test top-1 (%)", accuracy), line_chart("Losses", losses)]


def mean_chart(title: str, rows: Mapping[str, Mapping[int, Entry]]) -> Markup:
    """Return a chart of the mean test top-1 of each row's runs; empty for fewer than two rows with runs."""
    lines = []
    for name, runs in rows.items():
        curves = [entry.record["metrics"]["test_top1"] for entry in runs.values()]
        mean = [sum(values) / len(values) for values in zip(*curves, strict=False)]
        lines += [(f"{name} (n = {len(curves)})", mean)] if curves else []
    return line_chart(title, lines) if len(lines) > 1 else Markup()
