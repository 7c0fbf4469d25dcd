"""The training loop of the matchers: AdamW, warm-up and cosine decay, early stopping, checkpoints that resume to the
bit.

The loop knows nothing of modalities: it draws batches of row numbers and asks for their loss.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, Interrupts
from .logs import Log, open_log, progress_meter

#: One epoch's figures: "epoch", "loss", "lr", and those of the validation.
Record: TypeAlias = dict[str, float]
_CHECKPOINT_SECONDS = 30.0
_CHECKPOINT_PAUSE = 20  # at least so many times as long as the last checkpoint took


@dataclass(frozen=True)
class Training:
    """How a matcher is trained: what `fit` takes by name besides its data.

    Attributes:
        epochs: passes over the pairs, at most.
        lr: AdamW's largest learning rate (Loshchilov & Hutter 2019). None is 1e-3, and 1e-4 on a linear start, which
            larger steps soon leave for what a few training items have by chance.
        weight_decay: AdamW's, for matrices; biases, scales and temperatures have none.
        warmup: the share of the steps in which the learning rate rises; then it falls to 0 as a half cosine.
        batch_size: pairs a step; the other pairs of a batch are the negatives.
        patience: epochs without a better validation after which it stops; None never stops early.
        max_norm: gradients are scaled down to this norm.
        label_smoothing: with head="labels" alone, the share of each truth that is spread evenly over all labels
            (Szegedy et al. 2016).
        precision: "float32", or "bfloat16" under autocast.
        encoder_lr: the largest learning rate of encoders that are fine-tuned; warm-up and decay are the network's.
        kept_bytes: how much of the decoded images and frames is held in memory while encoders are fine-tuned; the rest
            is read again in each epoch, part of a batch ahead, which comes on top. It changes no result.

    Raises:
        ValueError: a figure outside its range.
    """

    epochs: int = 100
    lr: float | None = None
    weight_decay: float = 0.05
    warmup: float = 0.1
    batch_size: int = 128
    patience: int | None = 20
    max_norm: float = 1.0
    label_smoothing: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    encoder_lr: float = 1e-5
    kept_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_size", 2), ("patience", 1), ("kept_bytes", 0)):
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"fit: {name} must be an int of at least {least}, got {value!r}")
        for name, high, closed in (
            ("lr", math.inf, False),
            ("encoder_lr", math.inf, False),
            ("weight_decay", math.inf, True),
            ("warmup", 1.0, True),
            ("max_norm", math.inf, False),
            ("label_smoothing", 1.0, True),
        ):
            value = getattr(self, name)
            if value is None and name == "lr":
                continue
            if not (0 <= value <= high) or (value == 0 and not closed):
                raise ValueError(f"fit: {name} must be in {'[' if closed else '('}0.0, {high}], got {value!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f'fit: precision must be "float32" or "bfloat16", got {self.precision!r}')

    def on(self, *, linear: bool) -> Training:
        """With the learning rate of this start, where none was given."""
        return self if self.lr is not None else replace(self, lr=1e-4 if linear else 1e-3)

    def plain(self, *, tuned: bool) -> dict[str, Any]:
        """What the outcome depends on, with encoders that are `tuned` or without."""
        without = {"kept_bytes"} if tuned else {"kept_bytes", "encoder_lr"}
        return {name: value for name, value in asdict(self).items() if name not in without}

    @classmethod
    def of(cls, function: str, given: dict[str, Any], *, labels: bool = False) -> Training:
        """From arguments by name. Raises TypeError for one that does not exist, ValueError for one that would do
        nothing where no labels are learned."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(f"{function}: unknown argument {name!r}; of the training there are: {', '.join(known)}")
        training = cls(**given)
        if training.label_smoothing and not labels:
            raise ValueError(f"{function}: label_smoothing is for head='labels', got {training.label_smoothing!r}")
        return training


class Validation(NamedTuple):
    """What a validation found: `better` is compared, larger is better; `figures` are shown and logged."""

    better: tuple[float, ...]
    figures: dict[str, float]


def train(
    network: nn.Module,
    loss: Callable[[npt.NDArray[np.int64], float], Tensor],
    validate: Callable[[], Validation] | None,
    count: int,
    training: Training,
    *,
    seed: int,
    identity: str,
    checkpoint: str | os.PathLike[str] | None = None,
    log: Log = None,
    progress: bool | None = None,
    stop: int | None = None,
    encoders: nn.Module | None = None,
    ahead: Callable[[npt.NDArray[np.int64]], None] | None = None,
) -> list[Record]:
    """Train `network` in place and leave it with its best weights.

    Args:
        loss: (rows of a batch, the share of the training that is behind) -> scalar with gradients.
        validate: how good the network is now; None trains to the end and keeps the last weights. The weights before
            the first step are a candidate too.
        count: how many rows there are; each epoch visits each once, in an order that depends on `seed` and the epoch
            alone. A last batch of one row is left out: it has no negative.
        seed: of the order and of dropout. The state of torch's own generators is left as it was.
        identity: a digest of all that the outcome depends on; a checkpoint of another one is refused.
        checkpoint: a folder, made if missing. The state is written there, in one step, every half minute (or as often
            as takes a twentieth of the time), at the end and on Ctrl-C (KeyboardInterrupt follows). A later call goes
            on from it, to the bits of a run that was never cut off; one that had ended is loaded. The same number of
            threads is assumed, as torch's sums depend on it.
        log: a .csv file, or a folder for TensorBoard, or a writer of records.
        stop: end after this epoch, with the learning rates that a training of all `epochs` has until then.
        encoders: the part of `network` that learns at `training.encoder_lr`.
        ahead: is told the rows of the next batch before each step.

    Returns:
        One record an epoch, the first being that before training where there is a validation.

    Raises:
        ValueError: a loss that is not finite (the step is named), a checkpoint of other data or options.
        KeyboardInterrupt: untouched.
    """
    device = next(network.parameters()).device
    training = training.on(linear=False)
    loop = _Loop(network, loss, validate, count, training, seed, device, stop, encoders, ahead)
    kept = None if checkpoint is None else Checkpoint(checkpoint, identity)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        found = None if kept is None else kept.read(device)
        if found is not None:
            loop.restore(found)
        meter = stack.enter_context(progress_meter(loop.last, progress))
        book = stack.enter_context(open_log(log, loop.history))
        interrupts = stack.enter_context(Interrupts(active=kept is not None))
        saved, pause = time.monotonic(), _CHECKPOINT_SECONDS
        for record in loop.run():
            if record is not None:
                book(record)
                meter(record)
            if kept is not None and (interrupts.pending or time.monotonic() - saved > pause):
                begun = time.monotonic()
                kept.write(loop.state())
                saved = time.monotonic()
                pause = max(_CHECKPOINT_SECONDS, _CHECKPOINT_PAUSE * (saved - begun))
                interrupts.raise_pending()
        if kept is not None:
            kept.write(loop.state())
    loop.keep_best()
    return loop.history


class _Loop:
    """The state of a training between two steps, and the steps."""

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[npt.NDArray[np.int64], float], Tensor],
        validate: Callable[[], Validation] | None,
        count: int,
        training: Training,
        seed: int,
        device: torch.device,
        stop: int | None,
        encoders: nn.Module | None,
        ahead: Callable[[npt.NDArray[np.int64]], None] | None,
    ) -> None:
        self.last = training.epochs if stop is None else min(stop, training.epochs)
        assert training.lr is not None
        self.network, self.loss, self.validate, self.lr = network, loss, validate, training.lr
        self.count, self.training, self.seed, self.device = count, training, seed, device
        self.ahead, self.tunes = ahead, encoders is not None
        size = training.batch_size
        # A lone row would have no negatives.
        self.steps = -(-count // size) - (1 if count % size == 1 and count > 1 else 0)
        slow = set() if encoders is None else set(encoders.parameters())
        learned = [p for p in network.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = []
        for peak, of_encoder in ((self.lr, False), (training.encoder_lr, True)):
            mine = [p for p in learned if (p in slow) == of_encoder]
            matrices, others = [p for p in mine if p.ndim > 1], [p for p in mine if p.ndim <= 1]
            groups += [{"params": matrices, "peak": peak}, {"params": others, "peak": peak, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=training.weight_decay)
        self.epoch = self.step = self.best_epoch = 0
        self.sum = 0.0
        self.done = False
        self.best: tuple[float, ...] | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.history: list[Record] = []

    def run(self) -> Any:
        """Goes on from the present state; yields after each step, a record at the end of an epoch."""
        size = self.training.batch_size
        if not self.history and self.validate is not None:
            yield self._close({"epoch": 0.0, "loss": math.nan, "lr": 0.0})
        while self.epoch < self.last and not self.done:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
            self.network.train()
            while self.step < self.steps:
                rows, following = (order[i * size :][:size] for i in (self.step, self.step + 1))
                if self.ahead is not None and self.step + 1 < self.steps:
                    self.ahead(following)
                rate = self._one_step(rows)
                self.step += 1
                if self.step < self.steps:
                    yield None
            record = {"epoch": self.epoch + 1.0, "loss": self.sum / max(self.steps, 1), "lr": rate}
            self.epoch, self.step, self.sum = self.epoch + 1, 0, 0.0
            yield self._close(record)
        self.done = True

    def _one_step(self, rows: npt.NDArray[np.int64]) -> float:
        at = self.epoch * self.steps + self.step
        share = _schedule(at, self.training.epochs * self.steps, self.training.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["peak"]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bfloat16"):
            loss = self.loss(rows, at / (self.training.epochs * self.steps))
        value = float(loss.detach())
        if not math.isfinite(value):
            rates = f"lr than {self.lr:g}"
            if self.tunes:
                rates += f", or a smaller encoder_lr than {self.training.encoder_lr:g}"
            raise ValueError(
                f"fit: the loss of step {self.step} of epoch {self.epoch + 1} is {value}; try a smaller {rates}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.training.max_norm)
        self.optimizer.step()
        self.sum += value
        return share * self.lr

    def _close(self, record: Record) -> Record:
        """The end of an epoch: validate, keep the best, decide whether to go on."""
        if self.validate is not None:
            self.network.eval()
            with torch.no_grad():
                found = self.validate()
            record |= found.figures
            if self.best is None or found.better > self.best:
                self.best, self.best_epoch = found.better, self.epoch
                self.best_weights = {name: w.detach().clone() for name, w in self.network.state_dict().items()}
            patience = self.training.patience
            self.done = patience is not None and self.epoch - self.best_epoch >= patience
        self.history.append(record)
        return record

    def keep_best(self) -> None:
        """The best weights, where there was a validation; evaluation mode, without gradients."""
        self.optimizer.zero_grad()
        if self.best_weights:
            self.network.load_state_dict(self.best_weights)
        self.network.eval()

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch, "step": self.step, "sum": self.sum, "done": self.done, "history": self.history,
            "best": self.best, "best_epoch": self.best_epoch, "best_weights": self.best_weights,
            "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        for name in ("epoch", "step", "sum", "done", "history", "best", "best_epoch", "best_weights"):
            setattr(self, name, state[name])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)


def _schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at `step`: a rise, then a half cosine to 0."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))
