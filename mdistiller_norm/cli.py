"""The command line ``mdistiller-norm COMMAND ...``; each file in ``tools/`` runs one of its commands."""

import argparse
import errno
import importlib
import io
import os
import re
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mdistiller_norm import __version__
from mdistiller_norm.errors import ConfigError, Interrupted, UserError, first_line
from mdistiller_norm.files import command, package_data, python_arguments
from mdistiller_norm.registry import import_plugin

# Numbers of OSErrors that are reported without a path: of full disks and exhausted resources.
_LIMITS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.EMFILE, errno.ENOMEM,
)  # fmt: skip


def positive(text: str) -> int:
    """Parse an argument that must be a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)


def parse_duration(text: str) -> float:
    """Return the seconds of ``90s``, ``9m`` or ``1h30m``."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or not match:
        raise argparse.ArgumentTypeError(
            f"must be a duration such as 90s, 9m or 1h30m, got {text!r}"
        )
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60.0 * minutes + seconds


# Types of arguments, by their names in commands.yaml.
_TYPES: dict[str, Callable[[str], Any]] = {
    "int": int, "float": float, "path": Path, "positive": positive, "duration": parse_duration, "plugin": import_plugin,
}  # fmt: skip


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
            # Rank 0 reports an error of all ranks, after which torchrun ends the others.
            time.sleep(2)
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
    # PyTorch raises it in a signal handler, so it may cause any other error.
    while cause is not None:
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
    content = package_data("commands.yaml")
    for name, about in content["commands"].items():
        texts = {
            "help": about["help"],
            "description": about["help"],
            "epilog": about.get("epilog"),
        }
        _add_options(commands.add_parser(name, prog=command(name), **texts), about["options"])
    name, *rest = arguments or [""]
    if name not in commands.choices:
        parser.parse_args(arguments)
    about, parser = content["commands"][name], commands.choices[name]
    has_overrides = "overrides" in about["options"]  # KEY VALUE may be placed between the options
    options = parser.parse_intermixed_args(rest) if has_overrides else parser.parse_args(rest)
    options.command = [*python_arguments(name), *rest]
    return int(importlib.import_module(f"mdistiller_norm.{about['module']}").main(options))


def _add_options(parser: Any, options: dict[str, Any]) -> None:
    for flags, about in options.items():
        if flags == "exclusive":
            _add_options(parser.add_mutually_exclusive_group(), about)
        elif flags == "networks":
            _add_options(parser, about)
        elif flags in ("ACTION", "FIGURE"):
            actions = parser.add_subparsers(dest=flags.lower(), required=True, metavar=flags)
            for name, action in about.items():
                _add_options(actions.add_parser(name, help=action["help"]), action["options"])
        else:
            if "type" in about:
                about = about | {"type": _TYPES[about["type"]]}
            parser.add_argument(*flags.split(), **about)
