"""Errors that say what was found, what was expected and what to do."""

from __future__ import annotations


class CaptError(ValueError):
    """Root of every error this library raises on purpose.

    The command line turns it into one line on stderr and ``exit_code``.
    """

    exit_code = 2


class DataError(CaptError):
    """Images, labels, class names or split files that cannot be used."""

    exit_code = 3


class DamagedFileError(CaptError):
    """A file of ours whose checksum, schema or size is not what was written."""

    exit_code = 4


class ResourceError(CaptError):
    """Not enough disk or memory."""

    exit_code = 5


class NumericError(CaptError):
    """NaN or Inf where a finite number is required."""

    exit_code = 6


class MissingDependencyError(CaptError, ImportError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}': pip install 'capt[{extra}]' (or pip install {package})"
        )
