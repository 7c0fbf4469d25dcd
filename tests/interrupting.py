"""Ctrl-C, as a terminal sends it, to a child process."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import NamedTuple


class Interrupted(NamedTuple):
    out: str  # after the line that says it is ready
    err: str
    returncode: int
    seconds: float  # from the signal to the end


def _hear_control_c() -> None:
    """In the child: a shell's background job ignores the signal, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(command: list[str], ready: str, after: float) -> Interrupted:
    """Run `command`, wait for its line `ready`, send SIGINT `after` seconds later, and wait for its end."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_control_c
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{ready}\n"
        time.sleep(after)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return Interrupted(out, err, process.returncode, time.monotonic() - begin)
