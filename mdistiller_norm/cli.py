"""The command line ``mdistiller-norm COMMAND ...``; each file in ``tools/`` runs one of its commands."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mdistiller_norm import __version__
from mdistiller_norm.errors import ConfigError, Interrupted, UserError, first_line
from mdistiller_norm.program import command, python_arguments

# Command -> module and help. The module, imported only for its command, provides `add_arguments(parser)` and
# `main(options)`, which returns the exit code.
COMMANDS = {
    "train": ("", "Train a student, with or without a teacher."),
    "eval": ("mdistiller_norm.evaluation", "Evaluate weights of networks on a test split."),
    "predict": ("mdistiller_norm.predict", "Classify image files with a trained network."),
    "compare": (
        "mdistiller_norm.compare",
        "Compare size, speed, accuracy and agreement of trained networks.",
    ),
    "export": (
        "mdistiller_norm.export",
        "Write a trained network as a file that does not need this package.",
    ),
    "reproduce": ("mdistiller_norm.reproduce.command", "Train the runs of the paper's tables."),
    "report": (
        "mdistiller_norm.reproduce.report",
        "Write TABLES.md and report.html from the ledger of finished runs.",
    ),
    "visualize": ("mdistiller_norm.analysis.cli", "Draw the paper's figures from checkpoints."),
    "list": ("mdistiller_norm.catalog", "List networks, methods, data sets and packaged configs."),
    "config": ("mdistiller_norm.config_files", "Show a config, copy a packaged one, or list the keys."),
    "fetch": ("mdistiller_norm.fetch", "Download CIFAR-100 or published teachers."),
    "doctor": (
        "mdistiller_norm.doctor",
        "Describe the installation and run a short self-test, for bug reports.",
    ),
    "shards": ("mdistiller_norm.pack_shards", "Pack train/<class>/* and val/<class>/* into tar files."),
}
_WITH_OVERRIDES = ("train", "reproduce")  # KEY VALUE may be placed between the options


class ArgumentParser(argparse.ArgumentParser):
    """An ``argparse.ArgumentParser`` that raises its errors instead of printing them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{' '.join(message.split())}: see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, print its errors (see :func:`run`) and return its exit code.

    Args:
        arguments: the command and its arguments; default: those of the process.
    """
    code = run(lambda: execute(sys.argv[1:] if arguments is None else arguments))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from mdistiller_norm.engine import distributed

        distributed.exit_process(code)
    return code


def run(program: Callable[[], int]) -> int:
    """Call a program and print its error on one line.

    Returns:
        The exit code: 1 if the output was closed, 2 for an error, 128 + the number of the signal that stopped it.
    """
    _prepare_streams()
    try:
        return program()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except Interrupted as stop:
        print(f"{stop}; the state is saved: add --resume to the command to continue", file=sys.stderr)
        return 128 + stop.signal_number
    except (UserError, OSError, RuntimeError) as error:
        message = _message(error)
        if not message:
            raise
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # rank 0 reports an error of all ranks, after which torchrun ends the others
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2


def _prepare_streams() -> None:
    """Replace closed streams, escape characters that a stream cannot encode, and silence failed writer threads."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # A disk error in TensorBoard's thread is raised again in the main thread.
    default = threading.__excepthook__
    threading.excepthook = lambda error: None if isinstance(error.exc_value, OSError) else default(error)


def _message(error: BaseException) -> str:
    """Return the message for a user, or an empty string for an unexpected error."""
    cause: BaseException | None = error
    while cause is not None:  # PyTorch raises it in a signal handler, so it may cause any other error
        if isinstance(cause, RuntimeError) and str(cause).startswith("DataLoader worker (pid"):
            return (
                f"{first_line(cause).rstrip('.')}: a process that loads images was lost. If memory or shared memory is "
                "short, lower DATASET.NUM_WORKERS; --resume continues a run that has saved a state"
            )
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) and error.strerror:
        place = error.filename or "output"
        return f"{place}: {error.strerror} (the disk may be full, or a folder was removed, renamed or is read-only)"
    return str(error) if isinstance(error, UserError) else ""


def execute(arguments: Sequence[str]) -> int:
    """Parse a command and its arguments, run it and return its exit code.

    Raises:
        UserError: the input is wrong.
        Interrupted: a signal stopped the command after it had saved its state.
    """
    parser = ArgumentParser(
        prog="mdistiller-norm", description="Knowledge distillation for image classifiers."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, description=text, prog=command(name))
    name, *rest = arguments or [""]
    if name not in COMMANDS:
        parser.parse_args(arguments)
    add_arguments, program = _add_train_arguments, _train
    if name != "train":
        module = importlib.import_module(COMMANDS[name][0])
        add_arguments, program = module.add_arguments, module.main
    parser = commands.choices[name]
    add_arguments(parser)
    options = parser.parse_intermixed_args(rest) if name in _WITH_OVERRIDES else parser.parse_args(rest)
    options.command = [*python_arguments(name), *rest]
    return program(options)


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"example: {parser.prog} --cfg configs/cifar100/normkd/res32x4_res8x4.yaml SEED 1"
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config file")
    parser.add_argument("--resume", action="store_true", help="continue from latest.pt in the run folder")
    parser.add_argument(
        "--show", action="store_true", help="print the resolved config with the source of each key"
    )
    parser.add_argument(
        "--no-plugins", action="store_true", help="refuse a config that would import a plugin's code"
    )
    parser.add_argument(
        "--check-data", action="store_true", help="read every image, list the unreadable ones and exit"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys to change")


def _train(options: argparse.Namespace) -> int:
    from mdistiller_norm import config

    plugins: Any = "refuse" if options.no_plugins else "skip" if options.show else "import"
    resolved = config.load_config(options.cfg, options.overrides, plugins=plugins)
    if options.show:
        print(config.show(resolved))
        return 0
    if options.check_data:
        from mdistiller_norm.build import build_dataset
        from mdistiller_norm.pack_shards import list_unreadable

        return 2 if list_unreadable(build_dataset(resolved.node)) else 0

    from mdistiller_norm.run import train

    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun
        nodes, processes = os.environ["GROUP_WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]
        where = ["--standalone"] if nodes == "1" else ["--nnodes", nodes]
        launcher = ["torchrun", *where, "--nproc-per-node", processes]
    train(resolved, options.resume, [*launcher, *options.command])
    return 0
