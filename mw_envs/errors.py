"""Errors that are told in one message; anything else is a fault of this software, and keeps its traceback.

Each is also the built-in error that a caller in Python expects: a :class:`ValueError` for an argument, a
:class:`FileNotFoundError` for what is not there.
"""


class ExpectedError(Exception):
    """What was asked for cannot be done.

    The message is complete, with the value, what is expected, and what to do: a command prints it and exits.
    """


class InputError(ExpectedError, ValueError):
    """A value that does not fit."""


class NotThereError(ExpectedError, FileNotFoundError):
    """A file or folder that does not exist, or is incomplete."""


class InTheWayError(ExpectedError, FileExistsError):
    """A file or folder that exists and is not to be replaced."""


class NotInstalledError(ExpectedError, ImportError):
    """A package that is not there."""


class FailedError(ExpectedError, RuntimeError):
    """Work that does not go on, for a reason that is none of this software."""
