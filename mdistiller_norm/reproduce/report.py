"""Writes the report of the ledger of measured runs: Markdown, one HTML page, CSV, TensorBoard's hparams."""

from __future__ import annotations

import argparse
from pathlib import Path

from mdistiller_norm.errors import ConfigError, DataError
from mdistiller_norm.files import write_text
from mdistiller_norm.reproduce.collect import collect
from mdistiller_norm.reproduce.exports import write_csv, write_hparams
from mdistiller_norm.reproduce.markdown import to_markdown
from mdistiller_norm.reproduce.page import to_html
from mdistiller_norm.reproduce.views import Report

README_MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")


def _update_readme(report: Report, path: Path) -> bool:
    """Rewrite what stands between the marks of ``results/README.md``; returns whether there were any."""
    if not path.is_file():
        return False
    begin, end = README_MARKS
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        return False
    lines = [
        f"- {view.table.name} ({view.table.title}): {view.measured} of {view.total} cells"
        for view in report.tables
        if view.measured
    ]
    text = "\n".join(lines or ["- nothing yet"])
    write_text(f"{before}{begin}\n{text}\n{end}{after}", path)
    return True


def write_report(folder: Path, out: Path, *, smoke: bool, csv: bool, hparams: Path | None) -> list[Path]:
    """Write the files.

    Args:
        folder: of the records.
        out: gets ``TABLES.md``, ``report.html`` and, if asked for, ``runs.csv``; a ``README.md`` there is brought up to
            date between its marks.
        smoke: of the short schedule's runs.
        csv: write ``runs.csv``.
        hparams: folder for TensorBoard's view, or None.

    Returns:
        What was written.

    Raises:
        DataError: a file cannot be written.
    """
    report = collect(folder, smoke)
    written = [out / "TABLES.md", out / "report.html"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(to_markdown(report), written[0])
        write_text(to_html(report), written[1])
        if _update_readme(report, out / "README.md"):
            written.append(out / "README.md")
        if csv:
            written.append(out / "runs.csv")
            write_csv(report, written[-1])
        if hparams:
            written.append(hparams)
            write_hparams(report, hparams)
    except OSError as error:
        raise DataError(f"the report cannot be written to {out} ({error})") from error
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``report``."""
    parser.epilog = "example: python tools/report.py --export csv"
    parser.add_argument("--results", default="", metavar="DIR", help="folder of the ledger (default: results)")
    parser.add_argument("--out", default="", metavar="DIR", help="where to write (default: the folder of the ledger)")
    parser.add_argument("--smoke", action="store_true", help="report the runs of reproduce.py --smoke instead")
    parser.add_argument("--output", default="output", metavar="DIR", help="as in reproduce.py, for --smoke")
    parser.add_argument("--export", choices=["csv"], help="write runs.csv too, a line each run")
    parser.add_argument("--hparams", default="", metavar="DIR", help="write TensorBoard's hparams view there")


def main(options: argparse.Namespace) -> int:
    """Run the command ``report``."""
    default = Path(options.output, "smoke", "results") if options.smoke else Path("results")
    results = Path(options.results) if options.results else default
    if not (results / "runs").is_dir():
        raise ConfigError(f"there is no ledger {results / 'runs'}: tools/reproduce.py makes one")
    for path in write_report(
        results / "runs", Path(options.out or results), smoke=options.smoke, csv=options.export == "csv",
        hparams=Path(options.hparams) if options.hparams else None,
    ):  # fmt: skip
        print(f"wrote {path}")
    return 0
