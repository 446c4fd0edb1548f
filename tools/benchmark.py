"""Measure speed: ``python tools/benchmark.py --table9 | --evaluate | --exactness | --against PATH | --loader DIR``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mdistiller_norm.cli import ArgumentParser, check_output, run


def main(arguments: Sequence[str]) -> int:
    """Parse, measure, print."""
    parser = ArgumentParser(
        prog="tools/benchmark.py", description="Time the steps of training and the evaluation.",
        epilog="example: python tools/benchmark.py --table9 --methods KD,NormKD --json table9.json ENGINE.COMPILE none",
    )  # fmt: skip
    parser.add_argument("--table9", action="store_true", help="time, memory and extra parameters of the methods")
    parser.add_argument("--evaluate", action="store_true", help="images/s of evaluating the student on the test split")
    parser.add_argument(
        "--exactness", action="store_true", help="what compiling and caching the teacher change in --steps steps"
    )
    parser.add_argument("--against", type=Path, metavar="PATH", help="compare with the checkout of a reference")
    parser.add_argument(
        "--loader", default="", metavar="FOLDER", help="images/s of reading class folders, or: imagenet"
    )
    parser.add_argument("--methods", default="", metavar="A,B", help="DISTILLER.TYPEs; default: Table 9's, or NormKD")
    parser.add_argument("--pair", default="res32x4_res8x4", help="stem of the config files in configs/cifar100/METHOD")
    parser.add_argument("--cfg", default="", metavar="FILE", help="config file in place of the pair's")
    parser.add_argument("--blocks", type=int, default=7, help="rounds, the n of medians and quartiles")
    parser.add_argument("--steps", type=int, default=5, help="steps of a block")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before")
    parser.add_argument("--batch-size", type=int, help="short for SOLVER.BATCH_SIZE")
    parser.add_argument("--teacher", default="", metavar="FILE", help="the teacher's weights, or the word random")
    parser.add_argument("--synthetic", type=int, default=0, metavar="N", help="use N images of noise, not real ones")
    parser.add_argument(
        "--replay", action="store_true", help="all blocks on the same batches (teacher cache: all hits)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys to change")
    options = parser.parse_intermixed_args(arguments)
    check_output("--json", options.json)

    from mdistiller_norm import benchmark
    from mdistiller_norm.files import write_json

    batch = [] if options.batch_size is None else [f"SOLVER.BATCH_SIZE={options.batch_size}"]
    settings = benchmark.Settings(
        table9=options.table9, evaluation=options.evaluate, exactness=options.exactness, against=options.against,
        loader=options.loader, methods=[name for name in options.methods.split(",") if name], pair=options.pair,
        cfg=options.cfg, blocks=options.blocks, steps=options.steps, warmup=options.warmup, teacher=options.teacher,
        synthetic=options.synthetic, replay=options.replay, overrides=[*options.overrides, *batch],
        command=shlex.join(["python", "tools/benchmark.py", *arguments]),
    )  # fmt: skip
    record = benchmark.run(settings)
    print(benchmark.show(record))
    if options.json:
        write_json(record, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
