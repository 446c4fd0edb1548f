"""Errors a user can mend: one line that says what, where and what to do. The tools print it and exit with code 2."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What somebody else's error says, in one line: its first that is not empty, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class UserError(Exception):
    """Base of every error whose cause is an input: a config, a file, a name, a device."""


class ConfigError(UserError):
    """A config file, key, type or value that cannot be used."""


class DataError(UserError):
    """A data set that is missing, incomplete or not what it claims to be."""


class CheckpointError(UserError):
    """A checkpoint that is missing, broken or made for something else."""


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; training stopped before it reached a checkpoint."""
