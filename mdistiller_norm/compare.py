"""The command ``compare``: size, speed, accuracy and agreement of trained networks."""

from __future__ import annotations

import argparse
import html
import json
import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdistiller_norm.analysis.collect import Collected, check_same_classes, collect
from mdistiller_norm.build import build_device, placed
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.files import write_text
from mdistiller_norm.models import count_macs
from mdistiller_norm.models.base import Network
from mdistiller_norm.reproduce.ledger import identity
from mdistiller_norm.reproduce.stats import MeanStd, mean_std, paired_difference
from mdistiller_norm.run_folder import RESULT
from mdistiller_norm.student import Student, add_student_arguments, load_student

Record = dict[str, Any]
_HEADER = (
    "name", "network", "method", "parameters", "MB", "MMACs", "n", "last top-1", "best top-1", "measured top-1",
    "ms (batch 1)", "images/s (batch 64)",
)  # fmt: skip
_PAIR_HEADER = (
    "compared with {}",
    "top-1 difference (last epoch)",
    "agreement %",
    "only one correct",
    "McNemar p",
)


def mcnemar(first: Tensor, second: Tensor) -> Record:
    """Test whether two networks are equally accurate on the same images with McNemar's exact test.

    Args:
        first: bool ``[N]``, images that the first network classifies correctly.
        second: bool ``[N]``, those of the second network.

    Returns:
        Numbers of images that only one of them classifies correctly, and the two-sided p-value.
    """
    a, b = int((first & ~second).sum()), int((second & ~first).sum())
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1))
    return {"only_first": a, "only_second": b, "p": min(1.0, 2 * tail / 2 ** (a + b))}


def measure_speed(network: Network, size: Sequence[int], device: torch.device) -> Record:
    """Return the multiply-adds of an image, the latency at batch 1 in ms, and images per second at batch 64."""
    network = placed(network, device)
    images = torch.rand(64, 3, *size, device=device)

    def median_seconds(batch: Tensor) -> float:
        times: list[float] = []
        while len(times) < 5 or sum(times) < 0.3:
            start = time.perf_counter()
            network(batch).sum().item()  # waits for the device
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    with torch.inference_mode():
        one, many = median_seconds(images[:1]), median_seconds(images)
    return {"macs": count_macs(network, size), "latency_ms": 1000 * one, "images_per_second": 64 / many}


def group_runs(paths: Iterable[Path]) -> dict[str, list[tuple[Path, Record]]]:
    """Return the paths with the content of their ``result.json`` by label; runs that differ in the seed are a group."""
    groups = defaultdict(list)
    for path in paths:
        file = path / RESULT
        result: Record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        groups[identity(result["config"]) if result else str(path)].append((path, result))
    labels = [re.sub(r",?SEED=\d+", "", runs[0][0].name) for runs in groups.values()]
    if len(set(labels)) < len(groups):
        labels = [str(runs[0][0]) for runs in groups.values()]
    return dict(zip(labels, groups.values(), strict=True))


def describe(label: str, student: Student, results: Sequence[Record]) -> Record:
    """Return the size of a network and the accuracies of its runs."""
    tensors = student.network.state_dict().values()
    record: Record = {
        "name": label, "network": student.about["name"], "n": len(results),
        "method": "+".join(results[0]["method"]) or "none" if results else "-",
        "parameters": sum(parameter.numel() for parameter in student.network.parameters()),
        "megabytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6,
    }  # fmt: skip
    for epoch in ("last", "best"):
        found = mean_std(result[epoch]["top1"] for result in results)
        record[epoch] = found._asdict() if found else None
    return record | {"last_by_seed": {result["seed"]: result["last"]["top1"] for result in results}}


def compare_pair(first: Record, second: Record, outputs: Sequence[Collected | None]) -> Record:
    """Return the paired difference of two networks over common seeds, their agreement and McNemar's test."""
    difference = paired_difference(second["last_by_seed"], first["last_by_seed"])
    pair: Record = {"first": first["name"], "second": second["name"], "agreement": None, "mcnemar": None}
    pair |= {"difference": difference._asdict() if difference else None, "text": str(difference or "-")}
    a, b = outputs
    if a and b:
        predictions = a.logits.argmax(1), b.logits.argmax(1)
        pair["agreement"] = 100 * float((predictions[0] == predictions[1]).double().mean())
        pair["mcnemar"] = mcnemar(predictions[0] == a.targets, predictions[1] == b.targets)
    return pair


def tables(networks: Sequence[Record], pairs: Sequence[Record]) -> list[list[list[str]]]:
    """Return the table of the networks and that of the pairs as rows of text, headers included."""
    rows = [list(_HEADER)]
    for each in networks:
        accuracies = [str(MeanStd(**each[epoch])) if each[epoch] else "-" for epoch in ("last", "best")]
        measured = f"{each['measured_top1']:.2f}" if each["measured_top1"] is not None else "-"
        size = [
            f"{each['parameters']:,}",
            f"{each['megabytes']:.2f}",
            f"{each['macs'] / 1e6:.1f}",
            str(each["n"] or "-"),
        ]
        speed = [f"{each['latency_ms']:.2f}", f"{each['images_per_second']:.0f}"]
        rows.append([each["name"], each["network"], each["method"], *size, *accuracies, measured, *speed])
    if not pairs:
        return [rows]
    others = [[text.format(pairs[0]["first"]) for text in _PAIR_HEADER]]
    for pair in pairs:
        test = pair["mcnemar"]
        found = ["-"] * 3
        if test:
            found = [
                f"{pair['agreement']:.2f}",
                f"{test['only_second']} / {test['only_first']}",
                f"{test['p']:.3g}",
            ]
        others.append([pair["second"], pair["text"], *found])
    return [rows, others]


def _as_text(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _as_html(rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``compare``."""
    parser.epilog = f"example: {parser.prog} output/digits/student_plain output/digits/student_normkd"
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="run folders or weights; the first one is the reference",
    )
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--html", type=Path, metavar="FILE", help="also write the tables as a page")
    add_student_arguments(parser, batch_size=250)


def main(options: argparse.Namespace) -> int:
    """Compare the networks and print the tables."""
    if options.html and not options.html.parent.is_dir():
        raise ConfigError(f"--html {options.html} must be a file in an existing folder")
    device = build_device(options.device)
    networks: list[Record] = []
    outputs: list[Collected | None] = []
    for label, runs in group_runs(options.paths).items():
        student = load_student(runs[0][0], options.model, options.dataset, options.root)
        record = describe(label, student, [result for _, result in runs if result])
        record |= measure_speed(student.network, student.about["image_size"], device)
        found = None
        if student.dataset:
            found = collect(student.network, student.dataset, label, options.batch_size, device)
        outputs.append(found)
        networks.append(record | {"measured_top1": found.top1 if found else None})
    check_same_classes([found for found in outputs if found])
    rest = zip(networks[1:], outputs[1:], strict=True)
    pairs = [compare_pair(networks[0], record, [outputs[0], found]) for record, found in rest]
    shown = tables(networks, pairs)
    if options.html:
        style = "<meta charset='utf-8'><style>td {padding: 0.2em 0.8em; font-family: sans-serif}</style>\n"
        write_text(style + "<br>\n".join(map(_as_html, shown)), options.html)
    print(
        json.dumps({"networks": networks, "pairs": pairs}, indent=2)
        if options.json
        else "\n\n".join(map(_as_text, shown))
    )
    return 0
