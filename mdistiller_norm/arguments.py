"""The parser of the command lines: a mistake is one line, as anywhere else."""

from __future__ import annotations

import argparse
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
