"""The entry point of the console script: runs the app and turns every error into one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .errors import EXIT_ERROR, EXIT_INTERRUPTED, CommandError, StoppedError, one_line


def main(args: Sequence[str] | None = None) -> None:
    """Run `pycm` with `args` (default: the process's) and exit with its code."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: Sequence[str]) -> int:
    """Run `pycm` and return its exit code: 0; 2 after an error, told in one line on stderr; 130 after Ctrl-C.

    With --debug among the arguments the traceback comes first.
    """
    debug = "--debug" in args
    try:
        return _command(args)
    except KeyboardInterrupt:
        return _failed("interrupted", EXIT_INTERRUPTED, debug)
    except StoppedError as error:
        return _failed(f"interrupted: {error}", EXIT_INTERRUPTED, debug)
    except BrokenPipeError:  # the reader of our output, e.g. `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        if type(error).__name__ == "Abort":  # what older releases make of it
            return _failed("interrupted", EXIT_INTERRUPTED, debug)
        message = getattr(error, "format_message", None)  # a usage error of typer's
        text = one_line(error) if message is None else " ".join(str(message()).split())
        return _failed(text + _hint(error, message is not None, args), EXIT_ERROR, debug)


def _command(args: Sequence[str]) -> int:
    from .._optional import require

    typer = require("typer", "cli", "the pycm command")
    require("rich", "cli", "the pycm command")
    from .app import app

    result = typer.main.get_command(app).main(args=list(args), prog_name="pycm", standalone_mode=False)
    if result == EXIT_INTERRUPTED:  # what newer releases of typer make of Ctrl-C
        raise KeyboardInterrupt
    sys.stdout.flush()
    return result if isinstance(result, int) else 0


def _hint(error: Exception, usage: bool, args: Sequence[str]) -> str:
    if usage or isinstance(error, (CommandError, TypeError, OSError, ImportError, RuntimeError)):
        return ""
    if type(error).__name__ == "UnreadableInputError":
        return "" if "--skip-unreadable" in args else "; --skip-unreadable leaves them out"
    return "" if isinstance(error, ValueError) else " (unexpected: --debug shows where)"


def _failed(text: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
