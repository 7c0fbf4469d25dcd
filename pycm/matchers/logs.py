"""What a training shows: a bar with its figures, a CSV file, TensorBoard."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from .._optional import require

Write: TypeAlias = Callable[[Mapping[str, float]], None]
#: A file, a folder, or a writer of one that is open.
Log: TypeAlias = str | os.PathLike[str] | Write | None


@contextmanager
def progress_meter(epochs: int, progress: bool | None) -> Iterator[Write]:
    """A tqdm bar of epochs with loss and recall; `progress` as in `pycm.encoders.base.progress_bar`."""
    bar: Any = None
    if progress is not False:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            if progress:
                raise ImportError("progress=True needs tqdm: pip install tqdm") from None
        else:
            disable = None if progress is None else False
            bar = tqdm(total=epochs, desc="training", unit="epoch", disable=disable, leave=False)

    def show(record: Mapping[str, float]) -> None:
        bar.set_postfix({k: f"{v:.3g}" for k, v in record.items() if k not in ("epoch", "lr")}, refresh=False)
        bar.update(int(record["epoch"]) - bar.n)

    if bar is None:
        yield lambda record: None
    else:
        with bar:
            yield show


@contextmanager
def open_log(log: Log, history: Sequence[Mapping[str, float]]) -> Iterator[Write]:
    """A writer of records to a .csv file or a TensorBoard folder, made with their parents, or to another writer; it
    begins with `history`. The curves of a record's "fold" are fold-0/..., fold-1/... on the board.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
        OSError: the file cannot be written.
    """
    if log is None:
        yield lambda record: None
    elif callable(log):
        for record in history:
            log(record)
        yield log
    elif Path(log).suffix == ".csv":
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", newline="", encoding="utf-8") as file:
            writer = _Csv(file)
            for record in history:
                writer(record)
            yield writer
    else:
        # torch's own front end, which needs the package.
        require("tensorboard", None, "log=FOLDER")
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(os.fspath(log))

        def add(record: Mapping[str, float]) -> None:
            prefix = f"fold-{record['fold']:g}/" if "fold" in record else ""
            for name, value in record.items():
                if name not in ("epoch", "fold") and value == value:
                    board.add_scalar(prefix + name, value, int(record["epoch"]))

        try:
            for record in history:
                add(record)
            yield add
        finally:
            board.close()


class _Csv:
    """Lines as they come, flushed: a run that is cut off leaves what it had."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.writer: csv.DictWriter[str] | None = None

    def __call__(self, record: Mapping[str, float]) -> None:
        if self.writer is None:
            self.writer = csv.DictWriter(self.file, list(record))
            self.writer.writeheader()
        self.writer.writerow({name: format(value, ".9g") for name, value in record.items()})
        self.file.flush()
