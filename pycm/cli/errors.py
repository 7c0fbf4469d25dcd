"""Errors of the command line: one line on stderr, and an exit code."""

from __future__ import annotations

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class CommandError(Exception):
    """A mistake in what the user gave; the message names the thing."""


class StoppedError(Exception):
    """Ctrl-C where there is more to say than that; the message tells how to go on."""


def one_line(error: BaseException) -> str:
    """What to print for `error`: its message without line breaks, with the file's name where it has one."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, (CommandError, ValueError, OSError, ImportError)) and str(error):
        text = str(error)
    elif str(error):
        text = f"{type(error).__name__}: {error}"
    else:
        text = type(error).__name__
    return " ".join(text.split())
