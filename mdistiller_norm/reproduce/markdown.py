"""``TABLES.md``: the report as Markdown, measured tables only."""

from __future__ import annotations

from mdistiller_norm.reproduce.stats import plus_minus
from mdistiller_norm.reproduce.views import CellView, Report, TableView
from mdistiller_norm.reproduce.words import (
    NOTHING,
    UNCORRECTED,
    comparison_text,
    counted,
    delta_rows,
    differences,
    environment_text,
    measured_on,
    narrow_rows,
    parts_text,
    run_name,
    signed,
    state_text,
)


def _in_short(view: CellView) -> str:
    """A cell of a wide table, in one line of text."""
    paper = view.cell.paper.get("top1")
    before = f"{paper:.2f} → " if paper is not None else ""
    if not view.runs:
        return before + state_text(view)
    text = f"{before}**{plus_minus(view.best)}** (n {len(view.runs)}, last {plus_minus(view.last)}"
    return text + (f", {signed(view.difference)})" if view.difference is not None else ")")


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _section(title: str, lines: list[str]) -> list[str]:
    """A heading and its lines; nothing where there are none."""
    return [f"## {title}", "", *lines, ""] if lines else []


def _opening(report: Report) -> list[str]:
    out = ["# Measured tables", ""]
    if report.smoke:
        out += ["**Smoke runs: two epochs each, to see that everything works. No results.**", ""]
    latest = f", the latest of {report.latest[:10]}" if report.latest else ""
    return [
        *out,
        f"{counted(len(report.runs), 'run')} in the ledger{latest}. Made by `python tools/report.py`; "
        "the same with learning curves: `report.html`.", "",
        "Top-1 in percent on the test set, mean ± sample standard deviation over n seeds. *Best* is the best epoch on "
        "the test set, which is what the paper's code reports; *last* is the last epoch, selected by nothing. The "
        "difference is ours (best) minus the paper's; in wide tables a cell reads *paper → ours*. Each Δ is paired "
        "over seeds, of the best epochs, with a 95% interval.", "",
    ]  # fmt: skip


def _measured_table(view: TableView) -> list[str]:
    lines = [f"{view.measured} of {view.total} cells measured.", ""]
    if len(view.table.columns) == 1:
        lines += [*_table(*narrow_rows(view)), ""]
        lines += [f"- {name}: {value}" for name, value in delta_rows(view)]
    else:
        header = ["", *(column.name for column in view.table.columns)]
        rows = [[row.name, *(_in_short(cell) for cell in view.row(row.key))] for row in view.table.rows]
        lines += _table(header, [*rows, *delta_rows(view)])
    notes = [f"- {note}" for note in (*differences(view), *view.table.notes)]
    return [*lines, "", *notes]


def _pending_tables(views: list[TableView]) -> list[str]:
    names = [f"- {view.table.name}: {view.table.title} ({counted(view.total, 'cell')})" for view in views]
    return ["No run yet; the paper's numbers of these tables are in `report.html`.", "", *names] if names else []


def _claims(report: Report) -> list[str]:
    lines = [f"Paired over seeds, last epochs, 95% interval by Student's t. {UNCORRECTED}", ""]
    for claim in report.claims:
        lines.append(f"- {claim.claim.text}: **{claim.verdict}** ({claim.summary})")
        lines += [
            f"  - {c.where}: {c.what}: {comparison_text(c.last)}; best epochs {comparison_text(c.best)}; {c.verdict}"
            for c in claim.comparisons
            if c.last
        ]
    return lines


def _teachers(report: Report) -> list[str]:
    rows = [
        [
            check.table, check.name, f"{check.paper:.2f}" if check.paper is not None else NOTHING,
            ", ".join(f"{value:.2f}" for value in check.measured),
            ", ".join(check.hashes) + (" (different teachers!)" if len(check.hashes) > 1 else ""),
        ]
        for check in report.teachers
    ]  # fmt: skip
    return _table(["table", "teacher", "paper", "measured by its students' runs", "weights"], rows) if rows else []


def _other_runs(report: Report) -> list[str]:
    return [
        f"- {run_name(entry)}: best {entry.top1('best'):.2f}, last {entry.top1('last'):.2f}{measured_on(entry)} "
        f"(`{entry.path.name}`)"
        for entry in report.others
    ]


def to_markdown(report: Report) -> str:
    """``TABLES.md``."""
    ledger = report.ledger
    out = _opening(report)
    for view in report.tables:
        if view.measured:
            out += _section(f"{view.table.name}: {view.table.title}", _measured_table(view))
    out += _section("Pending", _pending_tables([view for view in report.tables if not view.measured]))
    out += _section("Claims", _claims(report))
    out += _section("Teachers", _teachers(report))
    environments = [
        f"- {counted(count, 'run')}: {environment_text(environment)}" for environment, count in report.environments
    ]
    environments += [f"- {text}" for text in map(parts_text, report.runs) if text]
    out += _section("Environment", environments)
    out += _section("Failed runs", [f"- {run_name(entry)}: {entry.record['error']}" for entry in ledger.failures])
    out += _section("Files left out", [f"- `{path.name}`: {reason}" for path, reason in ledger.left_out])
    seconds = [f"- `{entry.path.name}`" for entry in ledger.duplicates]
    out += _section("Second runs of the same seed, not counted", seconds)
    out += _section("Runs of no table", _other_runs(report))
    return "\n".join(out).rstrip() + "\n"
