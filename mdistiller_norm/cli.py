"""The command line ``mdistiller-norm COMMAND ...``; ``tools/*.py`` run single commands of it."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from mdistiller_norm import __version__
from mdistiller_norm.errors import ConfigError, Interrupted, UserError, first_line

# Command -> module and help. The module, imported only for its command, offers `add_arguments(parser)` and
# `main(options)`, which returns the exit code.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("", "Train a student, with or without a teacher."),
    "eval": ("mdistiller_norm.evaluation", "Evaluate weights of networks on a test split."),
    "export": ("mdistiller_norm.export", "Write a trained network as a file that does not need this package."),
    "reproduce": ("mdistiller_norm.reproduce.command", "Train the runs of the paper's tables."),
    "report": ("mdistiller_norm.reproduce.report", "Write TABLES.md and report.html from the ledger of finished runs."),
    "visualize": ("mdistiller_norm.analysis.cli", "Draw the paper's figures from checkpoints."),
    "shards": ("mdistiller_norm.pack_shards", "Pack train/<class>/* and val/<class>/* into tar files."),
}
_WITH_OVERRIDES = ("train", "reproduce")  # KEY VALUE may be placed between the options
_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG,
}  # fmt: skip


class ArgumentParser(argparse.ArgumentParser):
    """An ``argparse.ArgumentParser`` that raises its errors instead of printing them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{' '.join(message.split())}: see {self.prog} --help")


def main(arguments: Sequence[str] | None = None, prog: str = "") -> int:
    """Run a command and return its exit code, see :func:`run`.

    Args:
        arguments: the command and its arguments; default: those of the process.
        prog: program name for usage and messages.
    """
    code = run(lambda: execute(sys.argv[1:] if arguments is None else arguments, prog))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from mdistiller_norm.engine import distributed

        distributed.exit_process(code)
    return code


def run(program: Callable[[], int]) -> int:
    """Call a program and print its errors on one line.

    Returns:
        Its exit code; 1 if the output was closed, 2 for wrong input, 128 + the number of the signal that stopped it.
    """
    try:
        return program()
    except UserError as error:
        return _print_error(_lost_worker(error) or str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _print_error(f"{where}{error.strerror}: free some space or choose another path")
    except RuntimeError as error:
        if not (message := _lost_worker(error)):
            raise
        return _print_error(message)
    except Interrupted as stop:
        print(f"{stop}; the state is saved: add --resume to the command to continue", file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        return 130


def _lost_worker(error: BaseException | None) -> str:
    """Return the message for a loader worker that was killed, or an empty string.

    PyTorch raises this error in a signal handler, so it may be the cause of any other error.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
            return (
                f"{first_line(error).rstrip('.')}: a process that loads images was lost. If memory or shared memory is "
                "short, lower DATASET.NUM_WORKERS; --resume continues a run that has saved a state"
            )
        error = error.__cause__ or error.__context__
    return ""


def _print_error(text: str) -> int:
    """Print an error and return exit code 2."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # rank 0 reports an error of all ranks, after which torchrun ends the others
    print(f"error: {' '.join(text.splitlines())}", file=sys.stderr)
    return 2


def execute(arguments: Sequence[str], prog: str = "") -> int:
    """Parse a command and its arguments, run it and return its exit code.

    Raises:
        UserError: wrong input.
        Interrupted: a signal stopped the command after it had saved its state.
    """
    parser = ArgumentParser(prog="mdistiller-norm", description="Knowledge distillation for image classifiers.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, description=text, prog=prog or f"{parser.prog} {name}")
    name, *rest = arguments or [""]
    if name not in COMMANDS:
        parser.parse_args(arguments)
    add_arguments, command = _add_train_arguments, _train
    if name != "train":
        module = importlib.import_module(COMMANDS[name][0])
        add_arguments, command = module.add_arguments, module.main
    parser = commands.choices[name]
    add_arguments(parser)
    options = parser.parse_intermixed_args(rest) if name in _WITH_OVERRIDES else parser.parse_args(rest)
    options.command = [*(prog or f"-m mdistiller_norm {name}").split(), *rest]
    return command(options)


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python tools/train.py --cfg configs/cifar100/normkd/res32x4_res8x4.yaml SEED 1"
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config file")
    parser.add_argument("--resume", action="store_true", help="continue from latest.pt in the run folder")
    parser.add_argument("--show", action="store_true", help="print the resolved config with the source of each key")
    parser.add_argument("--check-data", action="store_true", help="read every image, list the unreadable ones and exit")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys to change")


def _train(options: argparse.Namespace) -> int:
    from mdistiller_norm import config

    resolved = config.load_config(options.cfg, options.overrides)
    if options.show:
        print(config.show(resolved))
        return 0

    if options.check_data:
        from mdistiller_norm.build import build_dataset
        from mdistiller_norm.pack_shards import list_unreadable

        broken = list_unreadable(build_dataset(resolved.node))
        print(f"{len(broken)} images cannot be read")
        return 2 if broken else 0

    from mdistiller_norm.run import train

    command = [*_launcher(), *options.command]
    train(resolved, options.resume, command)
    return 0


def _launcher() -> list[str]:
    """Return the program that started this process, read from torchrun's environment variables."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["python"]
    nodes, processes = os.environ["GROUP_WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]
    return ["torchrun", *(["--nnodes", nodes] if nodes != "1" else ["--standalone"]), "--nproc-per-node", processes]


def check_output(option: str, path: Path | None) -> None:
    """Check that the output file of an option can be created.

    Raises:
        ConfigError: the path is a folder, or its folder does not exist.
    """
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"{option} {path} must be a file in an existing folder")
