"""The report's wording, the same in Markdown and HTML: numbers, states, rows of tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from mdistiller_norm.config import leaves
from mdistiller_norm.engine.logger import Record
from mdistiller_norm.reproduce.jobs import SAME, SMOKE
from mdistiller_norm.reproduce.ledger import Entry
from mdistiller_norm.reproduce.stats import Paired, plus_minus
from mdistiller_norm.reproduce.views import CellView, TableView

MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"
UNCORRECTED = (
    "Each interval stands alone: none is corrected for the number of comparisons, nor for the choice of a peak's two "
    "rows by the same runs."
)


def _order(entry: Entry) -> str:
    """Whose it is: trials in lockstep share one."""
    seed = entry.record["config"].get("SEED", entry.seed)
    return "of its own seed" if seed == entry.seed else f"of seed {seed}"


# What does not make it another run, and yet may move its number.
_CONDITIONS: dict[str, Callable[[Entry], str]] = {
    "precision": lambda entry: entry.precision,
    "processes": lambda entry: str(entry.record.get("processes", 1)),
    "training images (SHA-256)": lambda entry: str(entry.record.get("data", ""))[:10],
    "order of the data": _order,
}


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
        why = "fewer than 3 trials" if comparison.n < 3 else "every trial differs by this"
        return f"{signed(comparison.mean)} (n = {comparison.n}: {why}, no interval)"
    return f"{signed(comparison.mean)} [{signed(comparison.low)}, {signed(comparison.high)}] (n = {comparison.n})"


def state_text(view: CellView) -> str:
    """What stands in a cell without runs."""
    if view.teacher_top1 is not None:
        return f"{view.teacher_top1:.2f} in its students' runs"
    return "published weights" if view.state == "published" else view.state


def run_name(entry: Entry) -> str:
    """A run for people, with what its command set of what is computed; held-out images are :func:`measured_on`'s."""
    config = entry.record["config"]
    named = {word.strip("'\"").partition("=")[0] for word in entry.record["command"].split()}
    settings = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in leaves(config)
        if key in named and key != "DATASET.VAL_SPLIT" and not key.startswith(SAME)
    ]
    if entry.record["smoke"]:
        settings = [setting for setting in settings if setting not in SMOKE]
    about = config["EXPERIMENT"]
    return " ".join([f"{about['PROJECT']}/{about['TAG']}", *settings]) + f", seed {entry.seed}"


def measured_on(entry: Entry) -> str:
    """What a run's accuracy was measured on, if not on the test set."""
    fraction = entry.record["config"]["DATASET"].get("VAL_SPLIT", 0)
    return f" on {fraction:.0%} of the training set, held out" if fraction else ""


def differences(view: TableView) -> list[str]:
    """What the students' runs of a column do not have in common though they are compared, a line each."""
    lines = []
    for column in view.table.columns:
        cells = [view.cells[row.key, column.key] for row in view.table.rows if row.key != "teacher"]
        for what, of in _CONDITIONS.items():
            counts = Counter(of(entry) for cell in cells for entry in cell.runs.values())
            del counts[""]  # older records do not say
            if len(counts) > 1:
                listed = ", ".join(f"{value} ({counted(number, 'run')})" for value, number in counts.most_common())
                lines.append(f"Runs of {column.name} differ in {what}: {listed}.")
    return lines


def parts_text(entry: Entry) -> str:
    """Where the parts of a run were trained that was resumed elsewhere; empty if it was not, or nothing is known."""
    parts: list[Record] = entry.record.get("parts", [])
    if not parts or (len(parts) == 1 and not parts[0]["from_step"]):
        return ""
    unknown = [f"what trained its first {parts[0]['from_step']} steps is not recorded"] if parts[0]["from_step"] else []
    known = [f"from step {part['from_step']} on by {environment_text(part)}" for part in parts]
    return f"{run_name(entry)}, was trained in parts: {'; '.join([*unknown, *known])}"


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
