"""Errors with a message for the user. The command line prints it on one line and exits with code 2."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

# Errors of invalid JSON, deep nesting, unexpected types and huge integers.
MALFORMED = (
    OSError,
    ValueError,
    RecursionError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
)


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


class UserError(Exception):
    """Base class of errors caused by an input: a config, a file, a name or a device."""


class ConfigError(UserError):
    """A config file, key, type or value cannot be used."""


class DataError(UserError):
    """A data set is missing or broken."""


class CheckpointError(UserError):
    """A checkpoint is missing, broken or does not fit."""


class NonFiniteLossError(UserError):
    """A loss or a weight became NaN or infinite; training stopped before the next checkpoint."""

    def __init__(self, value: str, when: str) -> None:
        problem = f"{value} became NaN or infinite {when}; this state is not saved"
        hint = "try a lower SOLVER.LR, a higher temperature or SOLVER.PRECISION fp32"
        super().__init__(f"{problem}: {hint}")


class Interrupted(Exception):  # noqa: N818 - a requested stop, not an error
    """A signal stopped training after the state was saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


@contextmanager
def needs_extra(extra: str, feature: str) -> Iterator[None]:
    """Raise a ConfigError that names an extra of the package if an import in the block fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{feature} needs the extra "{extra}": pip install "mdistiller_norm[{extra}]" ({error.name} is missing)'
        ) from error
