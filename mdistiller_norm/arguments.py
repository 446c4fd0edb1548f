"""What the command lines share: a mistake is one line, as anywhere else."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from mdistiller_norm.errors import ConfigError


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose mistakes are raised instead of printed under the usage."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{' '.join(message.split())}: see {self.prog} --help")


def check_output(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written in the end.

    Args:
        option: that names it.
        path: the file, if it was named.

    Raises:
        ConfigError: it is a folder, or in one that is not there.
    """
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"{option} {path} is a folder, or in one that is not there: name a file in one that is")
