"""Measure speed: ``python tools/benchmark.py --table9 | --evaluate | --against CHECKOUT | --loader FOLDER``.

In each round every contestant runs one block of steps, in an order that is reversed from round to round. Ratios are
computed within a round, so a machine that changes its speed changes the times but hardly the ratios.
"""

import multiprocessing
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_sides import Ours, Reference, load_images, memory, write_cifar
from torch.optim.swa_utils import update_bn
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from mdistiller_norm import cli
from mdistiller_norm.build import build_device, build_precision
from mdistiller_norm.cli import ArgumentParser
from mdistiller_norm.config import Config, load_config
from mdistiller_norm.data import ImageOptions, MemoryTrainLoader
from mdistiller_norm.data.folder import MEAN, STD, ImageDataset, data_root, files, list_images
from mdistiller_norm.engine.checkpoint import load_weights
from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.logger import environment
from mdistiller_norm.errors import ConfigError, DataError
from mdistiller_norm.files import PROJECT, write_json
from mdistiller_norm.models import build_model

TABLE9 = "KD,RKD,FITNET,OFD,CRD,REVIEWKD,DKD,NormKD,NormKD_W_DKD,AT"
Record = dict[str, Any]


def spread(values: Sequence[float], by: Sequence[float] | None = None) -> Record:
    """Return median, quartiles (inclusive method), number and list of the values, or of their quotients by ``by``."""
    values = [a / b for a, b in zip(values, by, strict=True)] if by else list(values)
    quartiles = values * 3
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    q1, median, q3 = quartiles
    return {"median": median, "q1": q1, "q3": q3, "n": len(values), "values": values}


def show(found: Record | None, digits: int) -> str:
    """Return the median and, in parentheses, the quartiles of a spread as text."""
    if not found:
        return "-"
    return f"{found['median']:.{digits}f} ({found['q1']:.{digits}f}-{found['q3']:.{digits}f})"


def interleave(
    sides: Mapping[str, Callable[[], float]], rounds: int, scale: float = 1.0
) -> dict[str, list[float]]:
    """Call each side once a round, reversing the order from round to round; return the results times ``scale``."""
    results: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            results[name].append(scale * sides[name]())
    return results


class Bench:
    """The data, the teacher's weights and the configs that the measurements share."""

    def __init__(self, options: Any, folder: Path) -> None:
        self.options, self.folder = options, folder
        if options.against:
            Reference.load_package(options.against)
        first = self.load(options.methods[0])
        self.node = first.node
        self.dataset, self.data = load_images(first, options.synthetic)
        images = len(self.dataset.train)
        if images < self.node.SOLVER.BATCH_SIZE:
            raise ConfigError(f"SOLVER.BATCH_SIZE must be <= {images}, the number of images")
        given = options.teacher or self.node.DISTILLER.TEACHER_WEIGHTS
        self.teacher = self.weights = given or "random"
        if self.teacher == "random":
            torch.manual_seed(0)
            network = build_model(self.node.DISTILLER.TEACHER, len(self.dataset.classes))
            loader = MemoryTrainLoader(self.dataset, 64, seed=0)
            # With its initial batch norms, the activations overflow.
            update_bn([loader.prepare(*next(loader.batches(1))).images], network)
            self.weights = str(folder / "teacher.pth")
            torch.save({"model": network.state_dict()}, self.weights)

    def load(self, method: str, *more: str) -> Config:
        """Return the config of a method: the pair's file, or that of ``--cfg`` with this method."""
        options, overrides = self.options, [*self.options.overrides, *more]
        if options.cfg:
            overrides.append(f"DISTILLER.TYPE={method}")
            return load_config(options.cfg, overrides, options.methods)
        folder = "dkd_normkd" if method == "NormKD_W_DKD" else method.lower()
        file = PROJECT / "configs" / "cifar100" / folder / f"{options.pair}.yaml"
        return load_config(file, overrides, options.methods)

    def config(self, method: str, name: str) -> Config:
        """Return the config of a run of the method in a subfolder of that name."""
        where = f"LOG.PREFIX={self.folder / name}", f"EXPERIMENT.NAME={method}"
        weights = f"DISTILLER.TEACHER_WEIGHTS={self.weights}"
        return self.load(method, weights, *where, "LOG.WANDB=false")

    def reference(self, method: str, ours: Ours) -> Reference:
        """Return the reference's run of the method, which starts with the current weights of ours."""
        node = self.config(method, "reference").node
        root = Path(node.DATASET.ROOT)
        if not self.data.startswith("real"):
            write_cifar(self.dataset, root := self.folder / "data")
        weights = [ours.step.trainable.student.state_dict(), load_weights(self.weights).state]
        return Reference(node, root, weights, self.folder / "reference", ours.device)

    def step_times(self, sides: Mapping[str, Ours | Reference]) -> dict[str, list[float]]:
        """Return the milliseconds of a step of each side in each round, after a warm-up."""
        options = self.options
        warmup = max(options.warmup, options.steps) if options.replay else options.warmup
        for side in sides.values():
            side.block(warmup)
        blocks = {name: partial(side.block, options.steps) for name, side in sides.items()}
        return interleave(blocks, options.blocks, 1000)


def measure_table9(bench: Bench) -> Record:
    """Measure time, memory and extra parameters of the methods."""
    methods = bench.options.methods
    # The compiled losses of many methods exceed the default limit, which PyTorch 2.7 renamed recompile_limit.
    limits = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, 4 * len(methods))
    ours = {
        method: Ours(bench.config(method, "timed"), bench.dataset, bench.options.replay)
        for method in methods
    }
    times = bench.step_times(ours)
    print(f"{'':14}{'ms a step':>24}{'x KD':>20}{'memory MB':>11}{'parameters':>12}")
    table: Record = {}
    for method, side in ours.items():
        ms = spread(times[method])
        kd = spread(times[method], times["KD"]) if "KD" in times else None
        extra = sum(part.extra_parameters() for part in side.step.trainable.methods)
        # A separate process: this one's allocator keeps the memory of the other methods.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            config = bench.config(method, "memory")
            peak = pool.submit(memory, config, bench.options.synthetic).result()
        print(f"{method:14}{show(ms, 1):>24}{show(kd, 3):>20}{peak:>11.0f}{extra:>12,}")
        table[method] = {
            "ms": ms,
            "ratio_to_kd": kd,
            "extra_parameters": extra,
            "memory_mb": peak,
            "log": side.log,
        }
    return table


def measure_against(bench: Bench, method: str) -> Record:
    """Time training steps of the reference and of ours."""
    ours = Ours(bench.config(method, "against"), bench.dataset, bench.options.replay)
    times = bench.step_times({"reference": bench.reference(method, ours), "ours": ours})
    record: Record = {f"{name}_ms": spread(values) for name, values in times.items()}
    record["log"] = ours.log
    record["ratio"] = spread(times["reference"], times["ours"])
    line = ", ".join(f"{name} {show(record[f'{name}_ms'], 1)} ms" for name in times)
    print(f"{method:14}{line}, reference / ours {show(record['ratio'], 2)}")
    return record


def measure_evaluation(bench: Bench) -> Record:
    """Measure images/s of evaluating our student on the test split, and the reference's with ``--against``."""
    method = bench.options.methods[0]
    ours = Ours(bench.config(method, "evaluate"), bench.dataset)
    trainable = ours.step.trainable
    loader = bench.dataset.eval_loader(bench.node.DATASET.TEST.BATCH_SIZE, ours.device)
    sides = {
        "ours": lambda: evaluate(trainable.student, loader, trainable.autocast).images_per_second
    }
    if bench.options.against:
        sides["reference"] = bench.reference(method, ours).images_per_second
    interleave(sides, 1)  # warm up
    rates = interleave(sides, bench.options.blocks)
    images = len(bench.dataset.test)
    record: Record = {name: spread(values) for name, values in rates.items()}
    ratio = spread(rates["ours"], rates["reference"]) if "reference" in rates else None
    line = ", ".join(f"{name} {show(record[name], 0)}" for name in rates)
    line += f", ours / reference {show(ratio, 2)}"
    print(f"evaluation of {images} images, images/s: {line}")
    return record | {"images": images, "ratio": ratio}


def measure_loader(node: Any, name: str, passes: int) -> Record:
    """Measure images/s of reading class folders with our loader and with torchvision's ImageFolder, best of passes."""
    folder = Path(name)
    if name == "imagenet":
        folder = data_root(Path(node.DATASET.ROOT), "imagenet") / "train"
    if not folder.is_dir():
        hint = "it must contain one folder of images per class"
        raise DataError(f"--loader: the folder {folder} does not exist; {hint}")
    data, size = node.DATASET, node.SOLVER.BATCH_SIZE
    options = ImageOptions(
        size=data.IMAGE_SIZE, resize=data.RESIZE, crop_scale=tuple(data.CROP_SCALE), mean=tuple(data.MEAN) or MEAN,
        std=tuple(data.STD) or STD, workers=data.NUM_WORKERS,
    )  # fmt: skip
    images = list_images(folder)
    split, classes = files(folder, images, tuple(images)), tuple(images)
    dataset = ImageDataset("throughput", classes, [split], options)
    ours = dataset.train_loader(size, 0, torch.device("cpu"))
    steps = [
        transforms.RandomResizedCrop(options.size, options.crop_scale),
        transforms.RandomHorizontalFlip(),
    ]
    steps += [transforms.ToTensor(), transforms.Normalize(options.mean, options.std)]
    workers = {"num_workers": options.workers, "persistent_workers": options.workers > 0}
    peers = ImageFolder(str(folder), transforms.Compose(steps))
    usual: Any = DataLoader(peers, size, shuffle=True, **workers)
    epochs, images = iter(range(1, passes + 2)), len(split)

    def rate(kind: str) -> float:
        start = time.perf_counter()
        for _ in ours.batches(next(epochs)) if kind == "ours" else usual:
            pass
        return images / (time.perf_counter() - start)

    sides = {kind: partial(rate, kind) for kind in ("ours", "usual")}
    interleave(sides, 1)  # start the workers
    best = {kind: max(rates) for kind, rates in interleave(sides, passes).items()}
    ratio = best["ours"] / best["usual"]
    rates = f"{best['ours']:.0f} images/s, torchvision {best['usual']:.0f}, ratio {ratio:.2f}"
    how = f"{options.workers} workers, best of {passes} passes"
    print(f"loading {images} images of {folder}, {how}: {rates}")
    about = {"folder": str(folder), "images": images, "workers": options.workers}
    return best | about | {"ratio": ratio}


def parse(arguments: Sequence[str]) -> Any:
    """Parse and check the command line."""
    example = "python tools/benchmark.py --table9 --methods KD,NormKD --json table9.json ENGINE.COMPILE none"
    parser = ArgumentParser(
        prog="tools/benchmark.py", description="Measure speed.", epilog=f"example: {example}"
    )
    add = parser.add_argument
    flag = partial(add, action="store_true")
    number = partial(add, type=int)
    flag("--table9", help="time, memory and extra parameters of the methods")
    flag("--evaluate", help="images/s of evaluating the student on the test split")
    add("--against", type=Path, metavar="PATH", help="compare with the checkout of a reference")
    add("--loader", metavar="FOLDER", help="images/s of reading class folders, or: imagenet")
    add("--methods", metavar="A,B", help="DISTILLER.TYPEs; default: those of Table 9, or NormKD")
    add("--pair", default="res32x4_res8x4", help="stem of files in configs/cifar100/METHOD")
    add("--cfg", metavar="FILE", help="config file to use instead of the pair's")
    number("--blocks", default=7, help="rounds, the n of medians and quartiles")
    number("--steps", default=5, help="steps of a block")
    number("--warmup", default=3, help="untimed steps before")
    number("--batch-size", help="short for SOLVER.BATCH_SIZE")
    add("--teacher", metavar="FILE", help="the teacher's weights (default: random ones)")
    number("--synthetic", default=0, metavar="N", help="use N images of noise, not real ones")
    flag("--replay", help="train on the same batches in all blocks (teacher cache: all hits)")
    add("--json", type=Path, metavar="FILE", help="write median, q1, q3, n and all values")
    add("overrides", nargs="*", metavar="KEY VALUE", help="config keys to change")
    options = parser.parse_intermixed_args(arguments)
    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise ConfigError(f"--json {options.json} must be a file in an existing folder")
    if min(options.blocks, options.steps, options.warmup) < 1:
        raise ConfigError("--blocks, --steps and --warmup must be >= 1")
    if not (options.table9 or options.evaluate or options.against or options.loader):
        hint = "add --table9, --evaluate, --against PATH or --loader FOLDER"
        raise ConfigError(f"nothing to measure: {hint}")
    methods = options.methods or (TABLE9 if options.table9 else "NormKD")
    options.methods = list(dict.fromkeys(methods.split(",")))
    if options.batch_size is not None:
        options.overrides.append(f"SOLVER.BATCH_SIZE={options.batch_size}")
    return options


def measure(options: Any, record: Record, folder: Path) -> None:
    """Run the requested measurements, print their results and add all numbers to the record."""
    training = options.table9 or options.evaluate or options.against
    plain = load_config(options.cfg, options.overrides, options.methods).node
    bench = Bench(options, folder) if training else None
    device = build_device(plain.DEVICE)
    dtype, _ = build_precision(plain.SOLVER.PRECISION, device)
    size, threads = 8192 if device.type == "cuda" else 1024, torch.get_num_threads()
    matrix = torch.rand(size, size, device=device).to(dtype or torch.float32)
    timer = Timer("a @ a", globals={"a": matrix}, num_threads=threads)
    peak = 2e-9 * size**3 / min(timer.timeit(1).mean for _ in range(10))
    machine = record["machine"] = environment(device) | {"matmul_gflops": peak}
    versions = f"{threads} threads, PyTorch {machine['torch']}"
    print(f"machine: {machine['device']}, {versions}, {peak:.0f} GFLOP/s")
    if options.loader:
        record["loader"] = measure_loader(plain, options.loader, options.blocks)
    if bench is None:
        return
    names, size = bench.node.DISTILLER, bench.node.SOLVER.BATCH_SIZE
    pair = {"teacher": names.TEACHER, "student": names.STUDENT}
    record |= pair | {"data": bench.data, "batch_size": size}
    print(f"{names.TEACHER} -> {names.STUDENT}, batch {size}")
    print(f"teacher's weights: {bench.teacher}\ndata: {bench.data}")
    print(f"blocks of {options.steps} steps, n = {options.blocks}; median (quartiles)")
    if options.table9:
        record["table9"] = measure_table9(bench)
    if options.evaluate:
        record["evaluate"] = measure_evaluation(bench)
    elif options.against:
        record["against"] = {method: measure_against(bench, method) for method in options.methods}


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, measure, and write the numbers."""
    options = parse(arguments)
    record: Record = {"command": shlex.join(["tools/benchmark.py", *arguments])}
    with tempfile.TemporaryDirectory(prefix="mdistiller_norm_benchmark_") as folder:
        measure(options, record, Path(folder))
    if options.json:
        write_json(record, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(program=main))
