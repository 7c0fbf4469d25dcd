"""Registers, shared memory and spills of every CUDA kernel, from a build's log; fails on what the compiler warns of.

    python .ci/kernels.py BUILD.LOG

The log holds what `ptxas -v` says of each kernel. Exit 1: a spill, wgmma that was serialised, any other warning of nvcc
or ptxas, or no kernel at all.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(\S+)' for '(\S+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"ptxas info\s*: Used (\d+) registers(.*)")
SHARED = re.compile(r"(\d+) bytes smem")
TOOLS = r"(csrc/\S*|nvcc|ptxas|nvlink|cudafe\+\+|fatbinary)"
WARNING = re.compile(TOOLS + r"\s*:?\s*warning|Potential Performance Loss")
# Of a demangled name: where it lives and what it returns; then its parameters, whose types say nothing here.
PLACE = re.compile(r"\(anonymous namespace\)::|pycm::cuda::|<unnamed>::|^void ")
PARAMETERS = re.compile(r"\([^()]*\)$")


def kernels(lines: list[str]) -> Iterator[tuple[str, str, int, int, int, int]]:
    """(name, architecture, registers, static shared bytes, stack bytes, spilled bytes)."""
    name = arch = ""
    stack = spilled = 0
    for line in lines:
        if entry := ENTRY.search(line):
            name, arch, stack, spilled = entry[1], entry[2], 0, 0
        elif name and (frame := FRAME.search(line)):
            # Also of functions that it calls.
            stack, spilled = max(stack, int(frame[1])), max(spilled, int(frame[2]) + int(frame[3]))
        elif name and (used := USED.search(line)):
            shared = SHARED.search(used[2])
            yield name, arch, int(used[1]), int(shared[1]) if shared else 0, stack, spilled
            name = ""


def readable(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return [PARAMETERS.sub("", PLACE.sub("", name)) for name in done.stdout.splitlines()]


def main() -> int:
    lines = Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace").splitlines()
    found = sorted(set(kernels(lines)))
    names = readable([kernel[0] for kernel in found])
    print(f"{'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}  arch     kernel")
    for name, (_, arch, registers, shared, stack, spilled) in sorted(zip(names, found, strict=True)):
        print(f"{registers:9} {shared:7} {stack:6} {spilled:6}  {arch:8} {name}")
    warnings = sorted({line.strip() for line in lines if WARNING.search(line)})
    spilling = [name for name, kernel in zip(names, found, strict=True) if kernel[5]]
    for line in warnings:
        print(line)
    for name in spilling:
        print(f"FAILED: {name} spills registers")
    if not found:
        print(f"FAILED: {sys.argv[1]} names no kernel")
    return 1 if warnings or spilling or not found else 0


if __name__ == "__main__":
    sys.exit(main())
