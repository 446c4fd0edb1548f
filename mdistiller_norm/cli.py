"""The command line ``mdistiller-norm COMMAND ...``; each file in ``tools/`` runs one of its commands."""

import argparse
import errno
import importlib
import io
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from mdistiller_norm import __version__
from mdistiller_norm.errors import ConfigError, Interrupted, UserError, first_line
from mdistiller_norm.files import command, python_arguments

# Command -> module and help. The module, imported only for its command, provides `add_arguments(parser)` and
# `main(options)`, which returns the exit code.
COMMANDS = {
    "train": ("run", "Train a student, with or without a teacher."),
    "distill": ("distill", "Train a student with a teacher on a folder of images, without a config."),
    "eval": ("evaluation", "Evaluate weights of networks on a test split."),
    "predict": ("predict", "Classify image files with a trained network."),
    "compare": ("compare", "Compare size, speed, accuracy and agreement of trained networks."),
    "export": ("export", "Write a trained network as a file that does not need this package."),
    "reproduce": ("reproduce.command", "Train the runs of the paper's tables."),
    "report": ("reproduce.report", "Write TABLES.md and report.html from the finished runs."),
    "visualize": ("analysis.cli", "Draw the paper's figures from checkpoints."),
    "list": ("catalog", "List networks, methods, data sets and packaged configs."),
    "config": ("config_files", "Show a config, copy a packaged one, or list the keys."),
    "fetch": ("fetch", "Download CIFAR-100 or published teachers."),
    "doctor": ("doctor", "Describe the installation and run a short self-test, for bug reports."),
    "shards": ("pack_shards", "Pack train/<class>/* and val/<class>/* into tar files."),
}
_WITH_OVERRIDES = ("train", "distill", "reproduce")  # KEY VALUE may be placed between the options
# Numbers of OSErrors that are reported without a path: of full disks and exhausted resources.
_LIMITS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.EMFILE, errno.ENOMEM,
)  # fmt: skip


class ArgumentParser(argparse.ArgumentParser):
    """An ``argparse.ArgumentParser`` that raises its errors instead of printing them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{' '.join(message.split())}: see {self.prog} --help")


def main(
    arguments: Sequence[str] | None = None, program: Callable[[Sequence[str]], int] | None = None
) -> int:
    """Run a command, or ``program``, with arguments (default: the process's); print its error on one line.

    Return the exit code: 1 if the output was closed, 2 for an error, 128 + the number of the signal that stopped it.
    """
    _prepare_streams()
    try:
        code = (program or execute)(sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        code = 130
    except Interrupted as stop:
        print(f"{stop}; the state is saved: repeat the command (train --resume)", file=sys.stderr)
        code = 128 + stop.signal_number
    except (UserError, OSError, RuntimeError) as error:
        if not (message := _message(error)):
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # rank 0 reports an error of all ranks, after which torchrun ends the others
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
        code = 2
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from mdistiller_norm.engine import distributed

        distributed.exit_process(code)
    return code


def _prepare_streams() -> None:
    """Replace closed streams, escape characters that a stream cannot encode, and silence failed writer threads."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # A disk error in TensorBoard's thread is raised again in the main thread.
    default = threading.__excepthook__
    threading.excepthook = lambda error: isinstance(error.exc_value, OSError) or default(error)


def _message(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:  # PyTorch raises it in a signal handler, so it may cause any other error
        if isinstance(cause, RuntimeError) and str(cause).startswith("DataLoader worker (pid"):
            return (
                f"{first_line(cause).rstrip('.')}: a process that loads images was lost. If memory or shared memory is "
                "short, lower DATASET.NUM_WORKERS; --resume continues a run that has saved a state"
            )
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) and (error.errno in _LIMITS or _is_users(error.filename)):
        reason = "the disk may be full, or a folder was removed, renamed or is read-only"
        place = os.fsdecode(error.filename) if _is_users(error.filename) else "output"
        return f"{place}: {error.strerror} ({reason})"
    return str(error) if isinstance(error, UserError) else ""


def _is_users(path: object) -> bool:
    if not isinstance(path, str | bytes):
        return False
    installed = sysconfig.get_paths()
    folders = (Path(__file__).parent, installed["stdlib"], installed["purelib"])
    return not any(Path(os.fsdecode(path)).resolve().is_relative_to(folder) for folder in folders)


def execute(arguments: Sequence[str]) -> int:
    """Parse a command and its arguments, run it and return its exit code.

    Raises:
        UserError: the input is wrong.
        Interrupted: a signal stopped the command after it had saved its state.
    """
    parser = ArgumentParser("mdistiller-norm", description="Distillation of image classifiers.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, description=text, prog=command(name))
    name, *rest = arguments or [""]
    if name not in COMMANDS:
        parser.parse_args(arguments)
    module = importlib.import_module(f"mdistiller_norm.{COMMANDS[name][0]}")
    parser = commands.choices[name]
    module.add_arguments(parser)
    parse = parser.parse_intermixed_args if name in _WITH_OVERRIDES else parser.parse_args
    options = parse(rest)
    options.command = [*python_arguments(name), *rest]
    return int(module.main(options))
