"""The command ``compare``: size, speed, accuracy and agreement of trained networks."""

import argparse
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from mdistiller_norm.analysis.collect import Collected, check_same_classes, collect
from mdistiller_norm.build import build_device, placed
from mdistiller_norm.catalog import columns
from mdistiller_norm.files import package_data, write_text
from mdistiller_norm.models import Network, count_macs
from mdistiller_norm.reproduce.ledger import Record, identity
from mdistiller_norm.reproduce.stats import mean_std, paired_difference
from mdistiller_norm.run_folder import RESULT
from mdistiller_norm.student import Student, load_student

_COLUMNS = package_data("compare.yaml")
_PAGE = """<meta charset="utf-8">
<style>td {padding: 0.2em 0.8em; font-family: sans-serif} tr:first-child {font-weight: bold}</style>
"""


def mcnemar(first: Tensor, second: Tensor) -> Record:
    """Test whether two networks are equally accurate on the same images with McNemar's exact test.

    ``first`` and ``second`` are bool ``[N]``, the images that each classifies correctly. Return the numbers of images
    that only one of them classifies correctly, and the two-sided p-value.
    """
    a, b = int((first & ~second).sum()), int((second & ~first).sum())
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1))
    return {"only_first": a, "only_second": b, "p": min(1.0, 2 * tail / 2 ** (a + b))}


@torch.inference_mode()
def measure_speed(network: Network, size: Sequence[int], device: torch.device) -> Record:
    """Return the latency at batch 1 in ms, and images per second at batch 64."""
    network = placed(network, device)
    images, threads = torch.rand(64, 3, *size, device=device), torch.get_num_threads()

    def median_seconds(batch: Tensor) -> float:
        names = {"network": network, "batch": batch}
        timer = Timer("network(batch)", globals=names, num_threads=threads)
        return timer.blocked_autorange(min_run_time=0.3).median

    one, many = median_seconds(images[:1]), median_seconds(images)
    return {"latency_ms": 1000 * one, "images_per_second": 64 / many}


def group_runs(paths: Iterable[Path]) -> dict[str, list[tuple[Path, Record]]]:
    """Return the paths with the content of their ``result.json`` by label; runs that differ in the seed are a group.

    The runs of a group have the same config, training images and teacher's weights.
    """
    groups: dict[tuple[object, ...], list[tuple[Path, Record]]] = {}
    for path in paths:
        file = path / RESULT
        result: Record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        key: tuple[object, ...] = (path,)
        if result:
            teacher = (result.get("teacher") or {}).get("hash")
            key = identity(result["config"]), result.get("data"), teacher
            if any(result["seed"] == other["seed"] for _, other in groups.get(key, ())):
                key = (path,)
        groups.setdefault(key, []).append((path, result))
    labels = [re.sub(r",?SEED=\d+", "", runs[0][0].name) for runs in groups.values()]
    if len(set(labels)) < len(groups):
        labels = [str(runs[0][0]) for runs in groups.values()]
    return dict(zip(labels, groups.values(), strict=True))


def describe(label: str, student: Student, results: Sequence[Record]) -> Record:
    """Return the size of a network and the accuracies of its runs."""
    return {
        "name": label,
        "network": student.about["name"],
        "method": "+".join(results[0]["method"]) or "none" if results else None,
        "parameters": sum(parameter.numel() for parameter in student.network.parameters()),
        "megabytes": sum(tensor.nbytes for tensor in student.network.state_dict().values()) / 1e6,
        "macs": count_macs(student.network, student.about["image_size"]),
        "n": len(results),
        "last": mean_std(result["last"]["top1"] for result in results),
        "best": mean_std(result["best"]["top1"] for result in results),
        "last_by_seed": {result["seed"]: result["last"]["top1"] for result in results},
    }


def compare_pair(
    first: Record, a: Collected | None, second: Record, b: Collected | None
) -> Record:
    """Return the paired difference of two networks over common seeds, their agreement and McNemar's test."""
    pair: Record = {
        "first": first["name"],
        "second": second["name"],
        "agreement": None,
        "only_first": None,
        "only_second": None,
        "difference": paired_difference(second["last_by_seed"], first["last_by_seed"]),
        "p": None,
    }
    if a and b:
        x, y = a.logits.argmax(1), b.logits.argmax(1)
        agreement = 100 * float((x == y).double().mean())
        pair |= {"agreement": agreement, **mcnemar(x == a.targets, y == b.targets)}
    return pair


def table(layout: Mapping[str, Sequence[str]], records: Sequence[Record]) -> list[list[str]]:
    """Return a header and a row for each record as text, with a dash for missing values."""
    rows = [[header.format(**records[0]) for header in layout]]
    for record in records:
        cells = ((record[key], style) for key, style in layout.values())
        rows.append(["-" if value is None else format(value, style) for value, style in cells])
    return rows


def _as_html(rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>\n" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>\n"


def _as_json(record: Record) -> Record:
    return record | {
        key: value._asdict() for key, value in record.items() if hasattr(value, "_asdict")
    }


def main(options: argparse.Namespace) -> int:
    """Compare the networks and print the tables."""
    device = build_device(options.device)
    compared: list[tuple[Record, Collected | None]] = []
    for label, runs in group_runs(options.paths).items():
        student = load_student(runs[0][0], options.model, options.dataset, options.root)
        record = describe(label, student, [result for _, result in runs if result])
        record |= measure_speed(student.network, student.about["image_size"], device)
        data = student.dataset
        found = (
            collect(student.network, data, label, options.batch_size, device) if data else None
        )
        compared.append((record | {"measured_top1": found.top1 if found else None}, found))
    check_same_classes([found for _, found in compared if found])
    networks = [record for record, _ in compared]
    pairs = [compare_pair(*compared[0], *other) for other in compared[1:]]
    tables = [table(_COLUMNS["networks"], networks)]
    if pairs:
        tables.append(table(_COLUMNS["pairs"], pairs))
    if options.json:
        content = {"networks": [*map(_as_json, networks)], "pairs": [*map(_as_json, pairs)]}
        print(json.dumps(content, indent=2))
    else:
        print("\n\n".join(map(columns, tables)))
    if options.html:
        write_text(_PAGE + "<br>\n".join(map(_as_html, tables)), options.html)
    return 0
