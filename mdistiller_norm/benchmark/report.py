"""What the benchmark can be asked for, and how its answer reads."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mdistiller_norm.benchmark.exactness import exactness
from mdistiller_norm.benchmark.loader import loader_throughput
from mdistiller_norm.benchmark.reference import Reference, load_package, write_cifar
from mdistiller_norm.benchmark.timing import Record, matmul_gflops, ratios, spread, take_turns
from mdistiller_norm.benchmark.workload import Ours, load_images, memory, method_config, method_folder, teacher_weights
from mdistiller_norm.build import build_device, build_precision, image_options
from mdistiller_norm.config import Config, load_config
from mdistiller_norm.data.class_tree import data_root
from mdistiller_norm.engine.checkpoint import load_weights
from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.logger import environment
from mdistiller_norm.errors import ConfigError, DataError
from mdistiller_norm.reproduce.tables import get_table

TABLE9 = ("KD", "RKD", "FITNET", "OFD", "CRD", "REVIEWKD", "DKD", "NormKD", "NormKD_W_DKD", "AT")
_PARTS = ("data", "teacher", "student", "loss", "backward", "optimizer")
_MEMORY_STEPS = 3


@dataclass(frozen=True)
class Settings:
    """What to measure, and how long.

    Attributes:
        table9: time, memory and parameters of the methods.
        evaluation: images/s of evaluating the pair's student.
        exactness: what compiling and caching the teacher change in its logits and in the losses of ``steps`` steps.
        against: checkout of a reference to compare with; None for none.
        loader: folder of class folders with images, or ``imagenet`` for the one under ``DATASET.ROOT``: images/s of
            reading it.
        methods: names; empty for Table 9's, or NormKD where only a reference is compared with.
        pair: stem of the config files.
        cfg: config file in place of the pair's; its method is replaced.
        blocks: rounds.
        steps: of a block.
        warmup: untimed steps of each contestant before.
        teacher: file, ``random``, or empty for what is found.
        synthetic: that many noise images in place of real ones; 0 for real ones where they are.
        replay: every block has the same batches.
        overrides: ``KEY VALUE`` items of the command line.
        command: the command line, for the record.
    """

    table9: bool = False
    evaluation: bool = False
    exactness: bool = False
    against: Path | None = None
    loader: str = ""
    methods: Sequence[str] = ()
    pair: str = "res32x4_res8x4"
    cfg: str = ""
    blocks: int = 7
    steps: int = 5
    warmup: int = 3
    teacher: str = ""
    synthetic: int = 0
    replay: bool = False
    overrides: list[str] = field(default_factory=list)
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("blocks", "steps", "warmup"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.synthetic and self.synthetic < 100:
            raise ConfigError(f"--synthetic needs at least 100 images, one a class, not {self.synthetic}")
        if not (self.table9 or self.evaluation or self.exactness or self.against or self.loader):
            raise ConfigError(
                "nothing to measure: add --table9, --evaluate, --exactness, --against PATH or --loader FOLDER"
            )

    @property
    def measured(self) -> tuple[str, ...]:
        """The methods: those given, or else all of Table 9 for it, and NormKD for the rest."""
        return tuple(dict.fromkeys(self.methods or (TABLE9 if self.table9 else ("NormKD",))))


class _Bench:
    """What all measurements share: the data, the teacher's weights, and a folder that goes away."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        if settings.against:
            load_package(settings.against)
        self.methods = settings.measured
        asked = self._asked(self.methods[0])
        self.device = build_device(asked.node)
        self.dataset, self.data = load_images(asked, settings.synthetic)
        if len(self.dataset.train) < asked.node.SOLVER.BATCH_SIZE:
            raise ConfigError(f"SOLVER.BATCH_SIZE {asked.node.SOLVER.BATCH_SIZE} exceeds the {self.data}")
        self.weights, self.teacher = teacher_weights(asked, self.dataset, settings.teacher, folder)
        self.configs = {method: self.config(method) for method in self.methods}
        self.node = self.configs[self.methods[0]].node
        self._cifar: Path | None = None

    def _asked(self, method: str, *more: str) -> Config:
        overrides = [*self.settings.overrides, *more]
        return method_config(self.settings.pair, self.settings.cfg, method, overrides, self.methods)

    def config(self, method: str, run: str = "timed", more: Sequence[str] = ()) -> Config:
        """The config of a run of that method, which writes to a subfolder called ``run``."""
        return self._asked(
            method, f"DISTILLER.TEACHER_WEIGHTS={self.weights}", f"LOG.PREFIX={self.folder / run}",
            f"EXPERIMENT.NAME={method}", "LOG.WANDB=false", *more,
        )  # fmt: skip

    def ours(self, method: str, run: str = "timed") -> Ours:
        """Our run of that method, warmed up."""
        ours = Ours(self.config(method, run), self.dataset, self.settings.replay)
        self.warm_up(ours)
        return ours

    def warm_up(self, side: Ours | Reference) -> None:
        """Run untimed steps; with ``replay`` all those of a block, so that the next time is not the first."""
        settings = self.settings
        side.block(max(settings.warmup, settings.steps) if settings.replay else settings.warmup)

    def cifar_root(self) -> Path:
        """A folder with our images as ``cifar-100-python``."""
        if not self._cifar:
            self._cifar = Path(self.node.DATASET.ROOT)
            if not self.data.startswith("real"):
                self._cifar = self.folder / "data"
                self._cifar.mkdir()
                write_cifar(self.dataset, self._cifar)
        return self._cifar

    @contextlib.contextmanager
    def reference(self, path: Path, method: str, ours: Ours) -> Iterator[Reference]:
        """The reference's run of that method, from our student's weights of now and our teacher's, warmed up."""
        weights = {"student": ours.step.trainable.student.state_dict(), "teacher": load_weights(self.weights).state}
        node = self.configs[method].node
        folder = self.folder / "reference"
        reference = Reference(path, node, self.cifar_root(), weights, folder, self.device)
        try:
            self.warm_up(reference)
            yield reference
        finally:
            reference.close()


def run(settings: Settings) -> Record:
    """Measure what was asked for.

    Returns:
        The record described in :mod:`mdistiller_norm.benchmark`.

    Raises:
        UserError: of the config, data, weights, device or reference.
    """
    plain = load_config(settings.cfg or None, settings.overrides, settings.measured).node
    device = build_device(plain)
    dtype = build_precision(plain, device)[0] or torch.float32
    training = settings.table9 or settings.evaluation or settings.exactness or settings.against
    with tempfile.TemporaryDirectory(prefix="mdistiller_norm_benchmark_") as folder:
        bench = _Bench(settings, Path(folder)) if training else None  # refuses bad input before anything is timed
        record: Record = {
            "command": settings.command,
            "machine": environment(device) | {"matmul_gflops": matmul_gflops(device, dtype)},
            "overrides": settings.overrides, "blocks": settings.blocks, "steps": settings.steps,
            "warmup": settings.warmup, "replay": settings.replay,
        }  # fmt: skip
        if settings.loader:
            record["loader"] = _loader(settings, plain)
        if bench:
            _measure_training(bench, record)
    return record


def _measure_training(bench: _Bench, record: Record) -> None:
    settings, node = bench.settings, bench.node
    record["data"] = bench.data
    record["pair"] = {
        "teacher": node.DISTILLER.TEACHER, "student": node.DISTILLER.STUDENT, "teacher_weights": bench.teacher,
        "batch_size": node.SOLVER.BATCH_SIZE,
    }  # fmt: skip
    if settings.table9:
        record["table9"] = _table9(bench, record["machine"]["matmul_gflops"])
    if settings.exactness:
        method = bench.methods[0]
        record["exactness"] = exactness(
            lambda run, more: Ours(bench.config(method, run, more), bench.dataset), bench.device, settings.steps
        )
    if settings.evaluation:
        record["evaluate"] = _evaluation(bench)
    elif settings.against:
        record["against"] = {method: _against(bench, settings.against, method) for method in bench.methods}


def _loader(settings: Settings, node: Any) -> Record:
    """Read a folder of images with our loader and torchvision's, in turns."""
    folder = Path(settings.loader)
    if settings.loader == "imagenet":
        root = data_root(Path(node.DATASET.ROOT), "imagenet")
        folder = root / ("train" if (root / "train").is_dir() else "val")
    if not folder.is_dir():
        raise DataError(f"--loader: there is no folder {folder}; it must hold class folders with images")
    options = image_options(node)
    found = loader_throughput(folder, options, batch_size=node.SOLVER.BATCH_SIZE, passes=settings.blocks)
    return {"folder": str(folder), "ratio": found.ours / found.usual} | asdict(found)


def _table9(bench: _Bench, peak: float) -> Record:
    settings = bench.settings
    if len(bench.methods) > 8:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(bench.methods))
    ours = {method: bench.ours(method) for method in bench.methods}
    times = take_turns({name: partial(side.block, settings.steps) for name, side in ours.items()}, settings.blocks)
    parts = take_turns({name: side.parts for name, side in ours.items()}, settings.blocks)
    names = (bench.node.DISTILLER.TEACHER, bench.node.DISTILLER.STUDENT)
    cells = [cell for cell in get_table("9").select() if (cell.column.teacher, cell.column.student) == names]
    paper = {cell.row.key: cell.paper for cell in cells}
    table: Record = {}
    for method, side in ours.items():
        gflop = side.gflop()
        measured = spread([1000 * seconds for seconds in times[method]])
        taken = [part for part in parts[method] if part]
        table[method] = {
            "ms": measured,
            "ratio_to_kd": ratios(times[method], times["KD"]) if "KD" in times else None,
            "extra_parameters": side.extra_parameters(),
            "gflop": gflop,
            "share_of_matmul": gflop / (measured["median"] / 1000) / peak,
            "parts_ms": {name: spread([1000 * part[name] for part in taken]) for name in _PARTS} if taken else None,
            "log": side.log,
            "paper": _paper(paper, method),
        }
    del ours, side
    for method in table:
        table[method]["memory_mb"] = _memory(bench, method)
    return table


def _paper(paper: Record, method: str) -> Record | None:
    printed = paper.get(method_folder(method))
    if printed is None:
        return None
    return {
        "ms": printed["ms"], "ratio_to_kd": printed["ms"] / paper["kd"]["ms"],
        "extra_parameters": round(printed["parameters"]),
    }  # fmt: skip


def _memory(bench: _Bench, method: str) -> Record:
    """In a fresh process: what one method leaves in the allocator is not the next one's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        arguments = (bench.config(method, "memory"), bench.settings.synthetic, _MEMORY_STEPS)
        return pool.submit(memory, *arguments).result()


def _against(bench: _Bench, path: Path, method: str) -> Record:
    ours = bench.ours(method, "against")
    with bench.reference(path, method, ours) as reference:
        steps = bench.settings.steps
        times = take_turns(
            {"reference": partial(reference.block, steps), "ours": partial(ours.block, steps)}, bench.settings.blocks
        )
    return {
        "ours_ms": spread([1000 * seconds for seconds in times["ours"]]),
        "reference_ms": spread([1000 * seconds for seconds in times["reference"]]),
        "ratio": ratios(times["reference"], times["ours"]),
        "log": ours.log,
    }


def _evaluation(bench: _Bench) -> Record:
    """Evaluate our student, and the reference's in turn."""
    path, method = bench.settings.against, bench.methods[0]
    ours = bench.ours(method, "evaluate")
    student = ours.step.trainable.student
    loader = bench.dataset.eval_loader(bench.node.DATASET.TEST.BATCH_SIZE, bench.device)
    autocast = ours.step.trainable.autocast

    def rate() -> float:
        return evaluate(student, loader, autocast).images_per_second

    record: Record = {"images": len(loader)}
    rate()
    with contextlib.ExitStack() as stack:
        contestants = {"ours": rate}
        if path:
            contestants["reference"] = stack.enter_context(bench.reference(path, method, ours)).images_per_second
            contestants["reference"]()
        rates = take_turns(contestants, bench.settings.blocks)
    record |= {name: spread(values) for name, values in rates.items()}
    if path:
        record["ratio"] = ratios(rates["ours"], rates["reference"])
    return record


def show(record: Record) -> str:
    """The record for people."""
    machine = record["machine"]
    lines = [
        f"machine: {machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}, matrix products "
        f"{machine['matmul_gflops']:.0f} GFLOP/s",
    ]
    if "pair" in record:
        pair = record["pair"]
        lines += [
            f"{pair['teacher']} -> {pair['student']}, batch {pair['batch_size']}",
            f"teacher's weights: {pair['teacher_weights']}",
            f"data: {record['data']}",
            f"blocks of {record['steps']} steps, n = {record['blocks']}; median (quartiles)",
        ]
    if "table9" in record:
        lines += ["", *_show_table9(record["table9"])]
    if "against" in record:
        lines += ["", f"{'method':14}{'reference ms':>24}{'ours ms':>24}{'reference / ours':>22}"]
        for method, row in record["against"].items():
            reference, ours, ratio = _range(row["reference_ms"], 1), _range(row["ours_ms"], 1), _range(row["ratio"], 2)
            lines.append(f"{method:14}{reference:>24}{ours:>24}{ratio:>22}")
    if "evaluate" in record:
        found = record["evaluate"]
        lines += ["", f"evaluation of {found['images']} images, images/s: ours {_range(found['ours'], 0)}"]
        if "ratio" in found:
            lines[-1] += f", reference {_range(found['reference'], 0)}, ours / reference {_range(found['ratio'], 2)}"
    if "exactness" in record:
        lines += ["", f"{'teacher':14}{'largest difference of a logit':>31}{'of its std':>12}{'of a loss':>12}"]
        for name, row in record["exactness"].items():
            part = row["logits"] / row["logits_std"]
            lines.append(f"{name:14}{row['logits']:>31.2e}{part:>12.1e}{row['loss']:>12.1e}")
    if "loader" in record:
        found = record["loader"]
        lines += [
            "",
            f"loading {found['images']} images of {found['folder']}, {found['workers']} workers, best of "
            f"{record['blocks']} passes: {found['ours']:.0f} images/s, torchvision {found['usual']:.0f}, "
            f"ratio {found['ratio']:.2f}",
        ]
    return "\n".join(lines)


def _range(found: Record | None, digits: int) -> str:
    if found is None:
        return "-"
    return f"{found['median']:.{digits}f} ({found['q1']:.{digits}f}-{found['q3']:.{digits}f})"


def _show_table9(table: Record) -> list[str]:
    lines = [
        f"{'':14}{'ms a step':>24}{'x KD':>20}{'memory MB':>11}{'+ MB':>7}{'parameters':>12}{'GFLOP':>8}{'of peak':>8}"
        " | paper, RTX 3080 Ti: ms   x KD  parameters"
    ]
    for method, row in table.items():
        peak, growth = (f"{value:.0f}" if value is not None else "-" for value in row["memory_mb"].values())
        line = (
            f"{method:14}{_range(row['ms'], 1):>24}{_range(row['ratio_to_kd'], 3):>20}{peak:>11}{growth:>7}"
            f"{row['extra_parameters']:>12,}{row['gflop']:>8.1f}{row['share_of_matmul']:>8.0%} | "
        )
        if paper := row["paper"]:
            line += f"{paper['ms']:>23.1f} {paper['ratio_to_kd']:>6.2f} {paper['extra_parameters']:>11,}"
        lines.append(line.rstrip())
    parts = {method: row["parts_ms"] for method, row in table.items() if row["parts_ms"]}
    if parts:
        lines += ["", f"{'parts, ms':14}" + "".join(f"{name:>20}" for name in _PARTS)]
    for method, spreads in parts.items():
        lines.append(f"{method:14}" + "".join(f"{_range(spreads[name], 1):>20}" for name in _PARTS))
    return lines
