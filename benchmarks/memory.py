"""Peak memory of a call beside torch's: losses of 16,384 pairs, and temporal pooling of long sequences.

Every measurement is a process of its own: what its high-water mark (VmHWM, Linux) rises by during a call, once inputs,
module and a small call of the same kind are there. Writes results/memory.json and memory.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clips import table, versions

from pycm._files import atomic_write
from pycm.bench.contrastive import Loss

HERE = Path(__file__).parent
COUNT, DIM = 16_384, 512
STEPS, SIZE = 256, 512
LOSSES: tuple[Loss, ...] = ("max_hinge", "sum_hinge", "info_nce", "sigmoid", "semi_hard")
POOLED = [(cell, batch, ragged) for cell in ("lstm", "gru") for batch in (16, 64) for ragged in (False, True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs="+", metavar="WORD", help="one measurement, in this process")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory.json")
    parser.add_argument("--readme", type=Path, default=HERE / "memory.md")
    options = parser.parse_args()
    if options.one:
        what, name, *rest = options.one
        print(loss(name, *rest) if what == "loss" else pooling(name, *rest))
        return
    rows: list[dict[str, Any]] = []
    for name in LOSSES:
        rows.append({"call": f"{name}, forward and backward", **both("loss", name)})
        print(rows[-1], flush=True)
    for cell, batch, ragged in POOLED:
        lengths = f"{STEPS // 8}..{STEPS} steps" if ragged else f"{STEPS} steps"
        rows.append({"call": f"{cell}, B={batch}, {lengths}", **both("pool", cell, str(batch), str(int(ragged)))})
        print(rows[-1], flush=True)
    results = {"versions": versions(), "rows": rows}
    with atomic_write(options.out) as file:
        json.dump(results, file, indent=1)
    with atomic_write(options.readme) as file:
        file.write(markdown(results))


def both(what: str, name: str, *rest: str) -> dict[str, float]:
    """MB of each library."""
    return {library: measured(what, name, library, *rest) for library in ("pycm", "torch")}


def measured(*words: str) -> float:
    command = [sys.executable, __file__, "--one", *words]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(float(found.stdout) / 1e6, 1)


def peak(call: Callable[[], Any]) -> int:
    """Bytes by which the high-water mark rises over what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins at what is resident
    before = high_water()
    call()
    return high_water() - before


def high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def loss(name: Loss, library: str) -> int:
    import torch

    from pycm import losses
    from pycm.bench.providers.loss import formula

    ours: dict[str, Callable[[Any, Any], Any]] = {
        "max_hinge": losses.max_hinge,
        "sum_hinge": lambda q, g: losses.max_hinge(q, g, hardest=False),
        "info_nce": losses.info_nce,
        "sigmoid": losses.sigmoid_loss,
        "semi_hard": losses.triplet,
    }
    function = ours[name] if library == "pycm" else formula(name)

    def step(count: int) -> Callable[[], Any]:
        sides = [torch.randn(count, DIM, requires_grad=True) for _ in range(2)]
        return lambda: function(*sides).backward()

    step(64)()
    return peak(step(COUNT))


def pooling(cell: str, library: str, batch: str, ragged: str) -> int:
    import torch

    import pycm.nn

    torch.manual_seed(0)
    count = int(batch)
    module = (torch.nn.LSTM if cell == "lstm" else torch.nn.GRU)(SIZE, SIZE, batch_first=True).eval()
    pool = pycm.nn.TemporalPool.from_torch(module, "mean").eval()
    lengths = torch.full((count,), STEPS)
    if int(ragged):
        lengths = torch.randint(STEPS // 8, STEPS + 1, (count,))

    def torchs(x: Any, n: Any) -> Any:
        """The cheaper of torch's ways in memory: packed where lengths differ."""
        if int(ragged):
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
            states, _ = torch.nn.utils.rnn.pad_packed_sequence(module(packed)[0], batch_first=True)
        else:
            states = module(x)[0]
        return states.sum(1) / n[:, None]

    function = pool if library == "pycm" else torchs
    x = torch.randn(count, STEPS, SIZE)
    with torch.inference_mode():
        function(x[:, :1], lengths.clamp(max=1))
        return peak(lambda: function(x, lengths))


def markdown(results: dict[str, Any]) -> str:
    note = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    rows = [
        [row["call"], row["pycm"], row["torch"], f"1/{row['torch'] / max(row['pycm'], 0.1):.1f}"]
        for row in results["rows"]
    ]
    measured = table(["call", "pycm, MB", "torch, MB", "share"], rows)
    return f"# Peak memory\n\nBy `python benchmarks/memory.py`. {note}.\n\n{ABOUT}\n\n{measured}\n"


ABOUT = f"""\
MB by which a process grows in a call; inputs, parameters and a small call of the same kind, which packs the weights of
the pooling (4 bytes a weight, once), come before. Losses: N = {COUNT}, D = {DIM}, fp32, beside the formula over the
whole matrix in torch. Pooling: inference, inputs and states of {SIZE}, fp32, the mean of the states, beside `nn.LSTM`
and `nn.GRU`, packed where lengths differ."""


if __name__ == "__main__":
    main()
