"""The ledger: one JSON file per run, never changed once written and checked when read.

File names end with the first 10 digits of the SHA-256 of the content, so ledgers can be merged by copying files.
"""

import hashlib
import json
import math
import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mdistiller_norm.config import default_config, dump, leaves, method_names
from mdistiller_norm.config_keys import REMOVED
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.errors import MALFORMED, DataError
from mdistiller_norm.files import package_data, regular, write_text
from mdistiller_norm.run_folder import NEUTRAL

Record = dict[str, Any]
FORMAT, UTC = 1, "%Y-%m-%dT%H:%M:%SZ"
# Keys that do not change the result except for its seed and rounding (INIT_SEED: in records of earlier versions).
NOT_IDENTIFYING = (
    *(set(NEUTRAL) - {"SOLVER.EPOCHS"}),
    "SEED",
    "SOLVER.PRECISION",
    "SOLVER.INIT_SEED",
)
# Types of the keys that are read from records, and columns of runs.csv.
SCHEMA: dict[str, dict[str, str]] = package_data("reproduce/record.yaml")
_LARGEST = 1e15  # absolute value of a number in a record


@dataclass(frozen=True)
class Entry:
    """A checked record with its file and the identity of its config."""

    path: Path
    record: Record
    identity: str

    @property
    def key(self) -> tuple[str, int]:
        return self.identity, self.record["seed"]

    @property
    def teacher_hash(self) -> str:
        # First 10 digits; empty for plain training.
        return str((self.record["teacher"] or {}).get("hash", ""))[:10]

    @property
    def precision(self) -> str:
        # May differ from the config's: not every device supports all.
        used = str(self.record.get("precision", self.record["config"]["SOLVER"]["PRECISION"]))
        cache = (self.record["teacher"] or {}).get("cache")
        return f"{used}, teacher cache in fp16" if cache == "fp16" != used else used

    @property
    def milliseconds(self) -> float:
        # Of a training step, from the median speed of the epochs.
        speed = statistics.median(self.record["metrics"]["images_per_second"])
        return float(1000 * self.record["config"]["SOLVER"]["BATCH_SIZE"] / speed)


@dataclass(frozen=True)
class Ledger:
    """The records of a folder; ``runs`` are the finished ones by (identity, teacher's hash) and seed."""

    runs: dict[tuple[str, str], dict[int, Entry]] = field(default_factory=dict)
    duplicates: list[Entry] = field(default_factory=list)  # further runs of a seed
    # The latest failure of each run that has not finished.
    failures: list[Entry] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)  # broken files with the reason

    def of(self, identity: str) -> dict[int, Entry]:
        """Return the runs of an identity by seed; of several teachers, those with the teacher of most runs."""
        found = [runs for (name, _), runs in self.runs.items() if name == identity]
        return max(found, key=len, default={})

    def has(self, identity: str, seed: int, teacher_hash: str = "") -> bool:
        return any(
            name == identity and teacher.startswith(teacher_hash) and seed in runs
            for (name, teacher), runs in self.runs.items()
        )

    def all_runs(self) -> list[Entry]:
        return [entry for runs in self.runs.values() for entry in runs.values()]

    def add(self, entry: Entry) -> None:
        runs = self.runs.setdefault((entry.identity, entry.teacher_hash), {})
        if runs.setdefault(entry.record["seed"], entry) is not entry:
            self.duplicates.append(entry)


def identity(tree: Mapping[str, Any]) -> str:
    """Return a hash of everything in a resolved config that determines the result, except the seed.

    Values equal to the defaults are left out, so that records from before a key was added stay valid.
    """
    used = method_names(tree)
    left_out = (*NOT_IDENTIFYING, *(f"{name}." for name in DISTILLERS if name not in used))
    defaults = dict(leaves(default_config())) | {
        key: about.default for key, about in REMOVED.items()
    }
    kept = {}
    for key, value in (dict(leaves(tree)) | {"DISTILLER.TYPE": used}).items():
        value = list(value) if isinstance(value, tuple) else value
        ignored = key.startswith(left_out) or (key == "DISTILLER.TEACHER" and not used)
        if not ignored and (key not in defaults or value != defaults[key]):
            kept[key] = value
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def signed_record(record: Record) -> Record:
    """Return a record with the SHA-256 of its content as ``sha256``."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    return content | {"sha256": digest.hexdigest()}


def _check_types(record: Record, section: str) -> None:
    for key, types in SCHEMA[section].items():
        value: Any = record
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise DataError(f"{key} is missing")
            value = value[part]
        if type(value).__name__ not in types.split():
            raise DataError(f"{key} must be {types.replace(' ', ' or ')}, got {value!r}")
        if type(value) in (int, float) and not abs(value) < _LARGEST:
            raise DataError(f"{key} is not finite or too large")


def check(record: Any) -> None:
    """Check a record's types and hash, and that its numbers agree with each other; raises DataError."""
    _check_types(record, "every")
    if record["format"] != FORMAT:
        raise DataError(f"format must be {FORMAT}, got {record['format']}")
    finished = record["status"] == "finished"
    _check_types(record, "finished" if finished else "failed")
    if record.get("sha256") != signed_record(record)["sha256"]:
        raise DataError("the content was edited or cut off (sha256 differs)")
    if not finished:
        return
    if record["teacher"]:
        _check_types(record["teacher"], "teacher")
    for part in record.get("parts", []):  # older records have none
        _check_types(part, "part")
    epochs, metrics, curve = record["epochs"], record["metrics"], record["metrics"]["test_top1"]
    for name, values in metrics.items():
        numbers = all(type(value) in (int, float) and abs(value) < _LARGEST for value in values)
        if len(values) != epochs or not numbers:
            raise DataError(f"metric {name} does not have {epochs} numbers")
    if metrics.get("epoch") != list(range(1, record["config"]["SOLVER"]["EPOCHS"] + 1)):
        raise DataError("the metrics do not cover the epochs 1 to SOLVER.EPOCHS")
    for which, expected in (("last", curve[-1]), ("best", max(curve))):
        if not math.isclose(record[which]["top1"], expected, abs_tol=1e-3):
            raise DataError(
                f"{which} top1 {record[which]['top1']} differs from {expected} in metrics"
            )


def read_ledger(folder: Path, smoke: bool = False) -> Ledger:
    """Read and check all records of a folder, which may be missing; ``smoke`` selects those of the short schedule."""
    ledger, entries = Ledger(), list[Entry]()
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(regular(path).read_text(encoding="utf-8"))
            check(record)
            entries.append(Entry(path, record, identity(record["config"])))
        except DataError as error:
            ledger.left_out.append((path, str(error)))
        except MALFORMED as error:
            ledger.left_out.append((path, f"malformed ({type(error).__name__}: {error})"))
    failed = {}
    for entry in sorted(entries, key=lambda entry: (entry.record["at"], entry.path.name)):
        if entry.record["smoke"] == smoke and entry.record["status"] == "finished":
            ledger.add(entry)
        elif entry.record["smoke"] == smoke:
            failed[entry.key] = entry
    ledger.failures.extend(entry for key, entry in failed.items() if not ledger.has(*key))
    return ledger


def finished_run(run: Path, config_file: str = "", smoke: bool = False) -> Entry:
    """Return the record of a run folder; raises DataError if it is not finished or its files do not agree."""
    path = run / "result.json"
    record: Record = {"format": FORMAT, "status": "finished", "smoke": smoke}
    try:
        text = regular(path).read_text(encoding="utf-8")
        prefix = Path(json.loads(text)["config"]["LOG"]["PREFIX"])
        if prefix.is_absolute():  # keep paths as they are in any other checkout
            text = text.replace(json.dumps(str(prefix))[1:-1], prefix.name)
        at = time.strftime(UTC, time.gmtime(path.stat().st_mtime))
        record |= {"config_file": config_file, "at": at} | json.loads(text)
        epochs = read_metrics(run / "metrics.jsonl")
        record["metrics"] = {"epoch": [metrics["epoch"] for metrics in epochs]}
        for name in epochs[0]:
            # A resumed run may have other metrics (LOG.GRAD_NORMS).
            if name != "epoch" and all(name in metrics for metrics in epochs):
                values = [float(f"{metrics[name]:.7g}") for metrics in epochs]
                record["metrics"][name] = values
        record = signed_record(record)
        check(record)
        return Entry(run, record, identity(record["config"]))
    except DataError as error:
        raise DataError(f"{run}: {error}") from None
    except MALFORMED as error:
        raise DataError(
            f"{run} is not a finished run ({type(error).__name__}: {error})"
        ) from None


def failed_record(
    error: str, log: Sequence[str], config: Mapping[str, Any], **fields: Any
) -> Record:
    """Return the record of a run that failed, with its resolved config and the last lines of its output."""
    at, config = time.strftime(UTC, time.gmtime()), yaml.safe_load(dump(config))
    head = {"format": FORMAT, "status": "failed", "at": at, **fields}
    return signed_record(head | {"config": config, "error": error, "log": log})


def write_record(record: Record, folder: Path) -> Path:
    """Write a record to a file of the ledger and return its path; writing a record twice gives one file."""
    experiment = record["config"]["EXPERIMENT"]
    failed = "" if record["status"] == "finished" else "-failed"
    name = f"{experiment['PROJECT']}-{experiment['TAG']}-seed{record['seed']}{failed}-{record['sha256'][:10]}"
    path = folder / (re.sub(r"[^A-Za-z0-9_.+-]+", "-", name) + ".json")
    folder.mkdir(parents=True, exist_ok=True)
    # Two processes may add the same record at once.
    temporary = path.with_suffix(f".{os.getpid()}")
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    write_text("{\n" + ",\n".join(lines) + "\n}\n", temporary)
    temporary.replace(path)
    return path
