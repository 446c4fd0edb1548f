"""The ledger of measured runs: one JSON file a run, never changed once written, checked on reading.

A file's name ends in the beginning of its content's SHA-256, so that ledgers of several machines merge by copying.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mdistiller_norm.engine.logger import Record, read_metrics
from mdistiller_norm.errors import DataError
from mdistiller_norm.files import write_text
from mdistiller_norm.reproduce.jobs import identity

FORMAT = 1
_Types = dict[str, type | tuple[type, ...]]
_NUMBER = (int, float)
# What is read of a record by somebody, by dotted key.
_COMMON: _Types = {
    "format": int, "status": str, "smoke": bool, "config_file": str, "seed": int, "at": str, "command": str,
    "config.EXPERIMENT.PROJECT": str, "config.EXPERIMENT.TAG": str, "config.DISTILLER.TYPE": (str, list),
}  # fmt: skip
_FINISHED: _Types = {
    "method": list, "student": str, "teacher": (dict, type(None)), "dataset": str, "epochs": int,
    "last.top1": _NUMBER, "last.top5": _NUMBER, "best.top1": _NUMBER, "best.top5": _NUMBER, "best.epoch": int,
    "seconds": _NUMBER, "extra_parameters": int, "metrics.test_top1": list, "metrics.images_per_second": list,
    "environment.device": str, "environment.torch": str, "environment.python": str, "environment.platform": str,
    "environment.commit": (str, type(None)), "environment.modified": bool,
    "config.DATASET.TYPE": str, "config.DISTILLER.STUDENT": str, "config.DISTILLER.TEACHER": str,
    "config.SOLVER.EPOCHS": int, "config.SOLVER.BATCH_SIZE": int, "config.SOLVER.PRECISION": str,
    "config.SOLVER.LR": _NUMBER,
}  # fmt: skip
_PART: _Types = {
    "from_step": int, "device": str, "precision": str, "processes": int, "torch": str, "python": str, "platform": str,
    "commit": (str, type(None)), "modified": bool,
}  # fmt: skip
_TAUGHT: _Types = {"teacher.name": str, "teacher.top1": _NUMBER, "teacher.hash": str}
_FAILED: _Types = {"error": str, "log": list}


@dataclass(frozen=True)
class Entry:
    """A file of the ledger that passed all checks.

    Attributes:
        path: the file.
        record: its content.
        identity: what its config computes (see :func:`~mdistiller_norm.reproduce.jobs.identity`).
    """

    path: Path
    record: Record
    identity: str

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.record["seed"])

    @property
    def finished(self) -> bool:
        """False for the record of a failure."""
        return bool(self.record["status"] == "finished")

    @property
    def precision(self) -> str:
        """That it was trained in, which is not the config's where the machine has no fast kernels for that."""
        trained = str(self.record.get("precision", self.record["config"]["SOLVER"]["PRECISION"]))
        rounded = (self.record["teacher"] or {}).get("cache") == "fp16" != trained
        return f"{trained}, teacher cache in fp16" if rounded else trained

    def top1(self, which: str) -> float:
        """Test top-1 in percent of the ``last`` or the ``best`` epoch."""
        return float(self.record[which]["top1"])

    def top5(self, which: str) -> float:
        """Test top-5 in percent of the ``last`` or the ``best`` epoch."""
        return float(self.record[which]["top5"])

    @property
    def milliseconds(self) -> float:
        """Time of a training step: the median over the epochs."""
        rates = self.record["metrics"]["images_per_second"]
        return float(1000 * self.record["config"]["SOLVER"]["BATCH_SIZE"] / statistics.median(rates))


@dataclass(frozen=True)
class Ledger:
    """What a folder of records holds.

    Attributes:
        runs: finished runs by identity, then by seed; of several with the same seed the one that finished first.
        duplicates: the later ones.
        failures: by time, the latest record of each failed run that no finished one of its identity and seed has made
            good.
        left_out: files that are broken, and why.
    """

    runs: dict[str, dict[int, Entry]] = field(default_factory=dict)
    duplicates: list[Entry] = field(default_factory=list)
    failures: list[Entry] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)

    def of(self, identity: str | None) -> dict[int, Entry]:
        """Finished runs of an identity by seed."""
        return self.runs.get(identity or "", {})

    def all_runs(self) -> list[Entry]:
        """Every finished run that counts."""
        return [entry for runs in self.runs.values() for entry in runs.values()]


def digest(record: Record) -> str:
    """SHA-256 of a record without its own ``sha256``."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_types(record: Record, wanted: _Types) -> None:
    for key, kind in wanted.items():
        value: Any = record
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise DataError(f"{key} is missing")
            value = value[part]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise DataError(f"{key} is {value!r}, of the wrong type")


def check(record: Any) -> None:
    """Check a record's shape, its hash, and that its numbers agree with each other.

    Raises:
        DataError: says what is wrong, without the file's name.
    """
    if not isinstance(record, dict):
        raise DataError("not a record")
    _check_types(record, _COMMON)
    if record["format"] != FORMAT:
        raise DataError(f"format {record['format']}, this version reads {FORMAT}")
    if record["status"] not in ("finished", "failed"):
        raise DataError(f"status is {record['status']!r}")
    _check_types(record, _FINISHED if record["status"] == "finished" else _FAILED)
    if record.get("sha256") != digest(record):
        raise DataError("its content is not what was written (sha256 differs): it was edited or cut off")
    if record["status"] == "failed":
        return
    if record["teacher"]:
        _check_types(record, _TAUGHT)
    for part in record.get("parts", []):  # older records have none
        _check_types(part, _PART)
    held_out = record["config"]["DATASET"].get("VAL_SPLIT", 0)  # older records do not know the key
    if not isinstance(held_out, int | float):
        raise DataError(f"config.DATASET.VAL_SPLIT is {held_out!r}, of the wrong type")
    metrics, epochs = record["metrics"], record["epochs"]
    if epochs != record["config"]["SOLVER"]["EPOCHS"]:
        raise DataError(f"epochs {epochs} differs from SOLVER.EPOCHS {record['config']['SOLVER']['EPOCHS']}")
    if metrics.get("epoch") != list(range(1, epochs + 1)):
        raise DataError(f"its metrics are not of the epochs 1 to {epochs}")
    for name, values in metrics.items():
        if len(values) != epochs or not all(isinstance(value, int | float) for value in values):
            raise DataError(f"metric {name} does not have {epochs} numbers")
    curve = metrics["test_top1"]
    for which, expected in (("last", curve[-1]), ("best", max(curve))):
        if not math.isclose(record[which]["top1"], expected, abs_tol=1e-3):
            raise DataError(f"{which} top1 {record[which]['top1']} differs from its metrics' {expected}")


def read_ledger(folder: Path, smoke: bool = False) -> Ledger:
    """Read and check all records of a folder; broken ones are named, never fatal.

    Args:
        folder: holds ``*.json``; need not exist.
        smoke: read the records of the short schedule instead of the others.
    """
    ledger = Ledger()
    entries: list[Entry] = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            check(record)
            entries.append(Entry(path, record, identity(record["config"])))
        except DataError as error:
            ledger.left_out.append((path, str(error)))
        except (OSError, ValueError, RecursionError) as error:
            ledger.left_out.append((path, f"not JSON ({error})"))
        except (LookupError, TypeError, AttributeError) as error:
            ledger.left_out.append((path, f"malformed ({type(error).__name__}: {error})"))
    entries = [entry for entry in entries if entry.record["smoke"] == smoke]
    for entry in sorted(entries, key=lambda entry: (entry.record["at"], entry.path.name)):
        if not entry.finished:
            ledger.failures.append(entry)
        elif entry.seed in ledger.runs.setdefault(entry.identity, {}):
            ledger.duplicates.append(entry)
        else:
            ledger.runs[entry.identity][entry.seed] = entry
    latest = {(entry.identity, entry.seed): entry for entry in ledger.failures}
    ledger.failures[:] = [e for e in ledger.failures if e in latest.values() and e.seed not in ledger.of(e.identity)]
    return ledger


def _columns(metrics: Sequence[Record]) -> Record:
    """Metrics by name instead of by epoch, to seven digits: a tenth of the space."""
    names = list(dict.fromkeys(name for record in metrics for name in record))
    rounded = [{name: float(f"{value:.7g}") for name, value in record.items()} for record in metrics]
    return {"epoch": [record["epoch"] for record in metrics]} | {
        name: [record[name] for record in rounded] for name in names if name != "epoch"
    }


def _portable(result: Record) -> Record:
    """A result whose paths start at the folder of all projects, as they do in everybody's checkout."""
    prefix = Path(result["config"]["LOG"]["PREFIX"])
    if not prefix.is_absolute():
        return result

    def shortened(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shortened(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shortened(item) for item in value]
        return value.replace(str(prefix), prefix.name) if isinstance(value, str) else value

    short: Record = shortened(result)
    return short


def finished_record(run: Path, config_file: str = "", smoke: bool = False) -> Record:
    """The record of a finished run folder.

    Raises:
        DataError: it is not finished, or its files do not agree with each other.
    """
    path = run / "result.json"
    try:
        result = _portable(json.loads(path.read_text(encoding="utf-8")))
        record: Record = {
            "format": FORMAT, "status": "finished", "smoke": smoke, "config_file": config_file,
            "at": _utc(path.stat().st_mtime),
        } | result | {"metrics": _columns(read_metrics(run / "metrics.jsonl"))}  # fmt: skip
        record["sha256"] = digest(record)
        check(record)
    except DataError as error:
        raise DataError(f"{run}: {error}") from None
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{run} is not a finished run ({error})") from None
    return record


def failed_record(
    config_file: str, config: Record, seed: int, command: str, error: str, log: list[str], smoke: bool
) -> Record:
    """The record of a run that ended in an error.

    Args:
        config_file: relative to the project.
        config: resolved.
        seed: of the run.
        command: the command line.
        error: one line.
        log: the last lines that it printed.
        smoke: on the short schedule.
    """
    record: Record = {
        "format": FORMAT, "status": "failed", "smoke": smoke, "config_file": config_file,
        "at": _utc(datetime.now(timezone.utc).timestamp()), "seed": seed, "command": command, "config": config,
        "error": error, "log": log,
    }  # fmt: skip
    return record | {"sha256": digest(record)}


def check_writable(folder: Path) -> None:
    """Make the ledger's folder, before anything is trained for it.

    Raises:
        DataError: no record could be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"the ledger {folder} cannot be written ({error})")


def add(record: Record, folder: Path) -> Path:
    """Write a record under a name of its own; the same record twice is one file.

    Raises:
        DataError: it does not pass the checks, or the folder cannot be written.
    """
    check(record)
    about = record["config"]["EXPERIMENT"]
    words = re.sub(r"[^A-Za-z0-9_.+-]+", "-", f"{about['PROJECT']}-{about['TAG']}-seed{record['seed']}")
    failed = "" if record["status"] == "finished" else "-failed"
    path = folder / f"{words}{failed}-{record['sha256'][:10]}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            mine = path.with_suffix(f".{os.getpid()}")  # two calls may add the same record at the same time
            write_text(_render(record), mine)
            mine.replace(path)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return path


def _render(record: Record) -> str:
    """JSON with a line for each key, and for each metric."""

    def lines(mapping: Record, indent: str) -> str:
        inside = indent + "  "
        items = [
            f"{inside}{json.dumps(key)}: {lines(value, inside) if key == 'metrics' else json.dumps(value)}"
            for key, value in mapping.items()
        ]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"

    return lines(record, "") + "\n"


def _utc(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
