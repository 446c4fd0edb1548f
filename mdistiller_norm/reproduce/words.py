"""The report's wording, the same in Markdown and HTML: numbers, states, rows of tables."""

from __future__ import annotations

from collections.abc import Callable

from mdistiller_norm.config import method_names
from mdistiller_norm.engine.logger import Record
from mdistiller_norm.reproduce.ledger import Entry
from mdistiller_norm.reproduce.stats import Paired, plus_minus
from mdistiller_norm.reproduce.views import CellView, TableView

MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"
UNCORRECTED = (
    "Each interval stands alone: none is corrected for the number of comparisons, nor for the choice of a peak's two "
    "rows by the same runs."
)


def signed(value: float) -> str:
    """A difference with its sign, to two decimals."""
    text = f"{value:+.2f}"
    return "±0.00" if text in ("+0.00", "-0.00") else text.replace("-", MINUS)


def counted(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def comparison_text(comparison: Paired | None) -> str:
    """A paired difference in words."""
    if comparison is None:
        return "no common seeds"
    if comparison.low is None or comparison.high is None:
        return f"{signed(comparison.mean)} (n = {comparison.n}: fewer than 3 trials, no interval)"
    return f"{signed(comparison.mean)} [{signed(comparison.low)}, {signed(comparison.high)}] (n = {comparison.n})"


def state_text(view: CellView) -> str:
    """What stands in a cell without runs."""
    if view.teacher_top1 is not None:
        return f"{view.teacher_top1:.2f} in its students' runs"
    return "published weights" if view.state == "published" else view.state


def run_name(entry: Entry) -> str:
    """A run for people, with what its command set of its methods' keys."""
    about, nodes = entry.record["config"]["EXPERIMENT"], method_names(entry.record["config"])
    settings = [word for word in entry.record["command"].split() if "=" in word and word.split(".")[0] in nodes]
    return " ".join([f"{about['PROJECT']}/{about['TAG']}", *settings]) + f", seed {entry.seed}"


def measured_on(entry: Entry) -> str:
    """What a run's accuracy was measured on, if not on the test set."""
    fraction = entry.record["config"]["DATASET"].get("VAL_SPLIT", 0)
    return f" on {fraction:.0%} of the training set, held out" if fraction else ""


def environment_text(environment: Record) -> str:
    """An environment in one line."""
    commit = (environment["commit"] or "unknown")[:10] + (" with local changes" if environment["modified"] else "")
    together = f"{environment['processes']} processes on " if environment["processes"] > 1 else ""
    return (
        f"{together}{environment['device']}, {environment['precision']}, torch {environment['torch']}, "
        f"Python {environment['python']}, {environment['platform']}, commit {commit}"
    )


def _printed_besides(view: TableView) -> list[tuple[str, Callable[[CellView], str], Callable[[CellView], str]]]:
    """What a table prints besides top-1: its name, the paper's text and ours, of a cell for which the paper has it."""
    extra: list[tuple[str, Callable[[CellView], str], Callable[[CellView], str]]] = []
    if "top5" in view.printed:
        extra.append(("top-5", lambda c: f"{c.cell.paper['top5']:.2f}", lambda c: plus_minus(c.top5)))
    if "ms" in view.printed:
        extra.append(("ms a batch", lambda c: f"{c.cell.paper['ms']:g}", lambda c: plus_minus(c.milliseconds)))
    if "parameters" in view.printed:
        extra.append((
            "extra parameters",
            lambda c: f"{c.cell.paper['parameters']:,}",
            lambda c: "" if c.parameters is None else f"{c.parameters:,}",
        ))  # fmt: skip
    return extra


def narrow_rows(view: TableView) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table with one column of the paper."""
    header = ["", "paper", "ours, best epoch", "ours, last epoch", "n", "difference"]
    if not view.table.is_papers:
        header = ["", "best epoch", "last epoch", "n"]
    extra = _printed_besides(view)
    for name, _, _ in extra:
        header += [f"{name}, paper", f"{name}, ours"]
    rows = []
    for row in view.table.rows:
        (cell,) = view.row(row.key)
        paper = cell.cell.paper.get("top1")
        line = [row.name, *([f"{paper:.2f}" if paper is not None else NOTHING] if view.table.is_papers else [])]
        best = plus_minus(cell.best) if cell.runs else state_text(cell)
        line += [best, plus_minus(cell.last), str(len(cell.runs))]
        if view.table.is_papers:
            line.append(signed(cell.difference) if cell.difference is not None else "")
        for _, of_paper, ours in extra:
            line += [of_paper(cell) if "top5" in cell.cell.paper or "ms" in cell.cell.paper else NOTHING, ours(cell)]
        rows.append(line)
    return header, rows


def delta_rows(view: TableView) -> list[list[str]]:
    """The differences under a table: the name, then a text for each column."""
    rows = []
    names = {row.key: row.name for row in view.table.rows}
    for delta in view.table.deltas:
        line = [f"{delta.name} = {names[delta.row]} {MINUS} {names[delta.minus]}"]
        for i, column in enumerate(view.table.columns):
            printed, ours = view.printed_delta(delta, i), view.delta(delta, column)
            text = f"{signed(printed)} → " if printed is not None else ""
            line.append(text + (comparison_text(ours) if ours else "pending"))
        rows.append(line)
    return rows
