"""The training loop: resuming to the same bits, Ctrl-C, early stopping, logs, and what it refuses."""

from __future__ import annotations

import csv
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pycm.matchers import Training  # noqa: E402
from pycm.matchers.checkpoint import Checkpoint  # noqa: E402
from pycm.matchers.training import Validation, train  # noqa: E402

OPTIONS = Training(epochs=6, lr=1e-2, batch_size=8, patience=None)


class Task:
    """A regression by a small network with dropout; `at` is called before each step with its number."""

    def __init__(self, at: Any = None, count: int = 30) -> None:
        draw = torch.Generator().manual_seed(3)
        self.x = torch.randn(count, 5, generator=draw)
        self.y = self.x.sin().sum(1, keepdim=True)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            layers = (torch.nn.Linear(5, 16), torch.nn.GELU(), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1))
            self.network = torch.nn.Sequential(*layers)
        self.at = at
        self.steps = 0
        self.batches: list[np.ndarray] = []

    def loss(self, rows: np.ndarray, done: float) -> Any:
        if self.at is not None:
            self.at(self.steps)
        self.steps += 1
        self.batches.append(rows)
        index = torch.from_numpy(rows)
        return torch.nn.functional.mse_loss(self.network(self.x[index]), self.y[index])

    def validate(self) -> Validation:
        error = float(torch.nn.functional.mse_loss(self.network(self.x), self.y))
        return Validation((-error,), {"error": error})

    def train(self, training: Training = OPTIONS, **options: Any) -> Any:
        given = {"seed": 7, "identity": "task", "progress": False, **options}
        return train(self.network, self.loss, self.validate, len(self.x), training, **given)

    def weights(self) -> list[np.ndarray]:
        return [w.detach().numpy().copy() for w in self.network.state_dict().values()]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_learns_and_the_seed_decides_everything() -> None:
    first, again, other = Task(), Task(), Task()
    history = first.train()
    assert again.train()[1:] == history[1:]
    other.train(seed=8)
    assert history[-1]["error"] < history[0]["error"] / 2
    assert same(first.weights(), again.weights())
    assert not same(first.weights(), other.weights())


def test_each_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    task = Task()
    task.train()
    epochs = [np.concatenate(task.batches[i : i + 4]) for i in range(0, 24, 4)]
    assert len(task.batches) == 24
    assert all(np.array_equal(np.sort(epoch), np.arange(30)) for epoch in epochs)
    assert not any(np.array_equal(epochs[0], epoch) for epoch in epochs[1:])
    alone = Task(count=33)  # the lone row of a fifth batch would have no negative
    alone.train()
    assert {len(batch) for batch in alone.batches} == {8}


def test_the_next_batch_is_told_before_each_step() -> None:
    told: list[tuple[int, np.ndarray]] = []
    task = Task()
    task.train(ahead=lambda rows: told.append((task.steps, rows)))
    expected = [step for step in range(24) if step % 4 < 3]  # an epoch has four steps
    assert [step for step, _ in told] == expected
    assert all(np.array_equal(rows, task.batches[step + 1]) for step, rows in told)


def test_torch_s_own_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Task().train()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("step", [0, 9, 11, 23])
def test_ctrl_c_leaves_a_checkpoint_that_resumes_to_the_same_bits(tmp_path: Path, step: int) -> None:
    handler = signal.getsignal(signal.SIGINT)
    whole = Task()
    history = whole.train()

    def interrupt(at: int) -> None:
        if at == step:
            signal.raise_signal(signal.SIGINT)

    cut = Task(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cut.train(checkpoint=tmp_path)
    assert cut.steps == step + 1  # it finished the step that it was in, and no other
    rest = Task()
    resumed = rest.train(checkpoint=tmp_path)
    assert rest.steps == 24 - step - 1
    assert resumed[1:] == history[1:]
    assert same(rest.weights(), whole.weights())
    assert signal.getsignal(signal.SIGINT) is handler
    ended = Task()
    assert ended.train(checkpoint=tmp_path)[1:] == history[1:]
    assert ended.steps == 0
    assert same(ended.weights(), whole.weights())
    assert [path.name for path in tmp_path.iterdir()] == ["training.pt"]


def test_a_run_that_is_killed_goes_on_from_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycm.matchers.training._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("pycm.matchers.training._CHECKPOINT_PAUSE", 0)  # after each step

    def kill(at: int) -> None:
        if at == 14:
            raise MemoryError

    with pytest.raises(MemoryError):
        Task(kill).train(checkpoint=tmp_path)
    whole, rest = Task(), Task()
    whole.train()
    rest.train(checkpoint=tmp_path)
    assert rest.steps == 10
    assert same(rest.weights(), whole.weights())


def test_checkpoints_that_take_long_are_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 10 s, a checkpoint 4 s."""
    now = 0.0
    written: list[int] = []

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    def write(self: Any, state: Any) -> None:
        written.append(task.steps)
        wait(4)

    task = Task(lambda step: wait(10))
    monkeypatch.setattr("pycm.matchers.training.time.monotonic", lambda: now)
    monkeypatch.setattr("pycm.matchers.training.Checkpoint.write", write)
    task.train(checkpoint=tmp_path)
    assert written == [4, 13, 22, 24]  # the first after more than 30 s, then after more than 80; the end


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def twice(at: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    task = Task(twice)
    with pytest.raises(KeyboardInterrupt):
        task.train(checkpoint=tmp_path)
    assert task.steps == 0


def test_a_checkpoint_of_another_training_or_none_is_refused(tmp_path: Path) -> None:
    Task().train(checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"training\.pt is of a training on other data or with other options"):
        Task().train(checkpoint=tmp_path, identity="another")
    (tmp_path / "training.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"training\.pt is not a checkpoint, or a damaged one; remove it"):
        Task().train(checkpoint=tmp_path)


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    def interrupt(at: int) -> None:
        if at == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Task(interrupt).train(checkpoint=tmp_path)
    before = (tmp_path / "training.pt").read_bytes()
    large = {"weights": torch.zeros(1 << 18)}  # torch's own writer fails otherwise than a small one's last flush

    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*training\.pt"):
            Task().train(checkpoint=tmp_path)
        with pytest.raises(OSError, match=r"File too large: .*training\.pt"):
            Checkpoint(tmp_path, "").write(large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "training.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_the_best_weights_are_kept_and_patience_ends_it() -> None:
    task = Task()
    seen: list[list[np.ndarray]] = []
    scores = iter([0.0, 1.0, 3.0, 2.0, 2.5, 2.9, 9.0])

    def validate() -> Validation:
        seen.append(task.weights())
        return Validation((next(scores),), {})

    history = train(
        task.network, task.loss, validate, 30, Training(epochs=6, batch_size=8, patience=3), seed=0, identity=""
    )
    assert [record["epoch"] for record in history] == [0, 1, 2, 3, 4, 5]
    assert same(task.weights(), seen[2])
    assert not task.network.training


def test_what_was_better_before_the_first_step_is_kept() -> None:
    task = Task()
    before = task.weights()
    scores = iter([1.0, *[0.0] * 6])
    train(task.network, task.loss, lambda: Validation((next(scores),), {}), 30, OPTIONS, seed=0, identity="")
    assert same(task.weights(), before)


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    task = Task()
    training = Training(epochs=10, lr=0.5, warmup=0.3, batch_size=30, max_norm=1e-9, weight_decay=0.0)
    history = train(task.network, task.loss, None, 30, training, seed=0, identity="")
    rates = [record["lr"] for record in history]
    np.testing.assert_allclose(rates[:3], [0.125, 0.25, 0.375])
    np.testing.assert_allclose(rates[3:], [0.25 * (1 + math.cos(math.pi * t / 7)) for t in range(7)])


def test_bfloat16_is_near_float32_and_not_the_same() -> None:
    plain, low = Task(), Task()
    a = plain.train()[-1]["error"]
    b = low.train(Training(epochs=6, lr=1e-2, batch_size=8, patience=None, precision="bfloat16"))[-1]["error"]
    assert a != b
    assert abs(a - b) < 0.1 * a
    assert all(w.dtype == np.float32 for w in low.weights())


def test_a_loss_that_is_not_finite_names_the_step() -> None:
    task = Task()
    task.x[3] = torch.inf
    with pytest.raises(ValueError, match=r"the loss of step \d of epoch 1 is (nan|inf); try a smaller lr than 0\.01"):
        train(task.network, task.loss, None, 30, OPTIONS, seed=0, identity="")


def test_a_csv_log_is_whole_after_resuming(tmp_path: Path) -> None:
    def interrupt(at: int) -> None:
        if at == 10:
            signal.raise_signal(signal.SIGINT)

    log = tmp_path / "log.csv"
    with pytest.raises(KeyboardInterrupt):
        Task(interrupt).train(checkpoint=tmp_path, log=log)
    assert [row["epoch"] for row in csv.DictReader(log.open())] == ["0", "1", "2"]
    history = Task().train(checkpoint=tmp_path, log=log)
    rows = list(csv.DictReader(log.open()))
    assert [int(row["epoch"]) for row in rows] == list(range(7))
    assert list(rows[0]) == ["epoch", "loss", "lr", "error"]
    np.testing.assert_allclose([float(row["error"]) for row in rows], [r["error"] for r in history], rtol=1e-8)


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = Task().train(log=tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    errors = [event.value for event in events.Scalars("error")]
    np.testing.assert_allclose(errors, [record["error"] for record in history], rtol=1e-6)
    assert len(events.Scalars("loss")) == 6  # there is none before training


def test_the_bar_shows_loss_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    Task(lambda step: time.sleep(0.03)).train(progress=True)  # tqdm draws ten times a second
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "loss=" in shown
    assert "error=" in shown
    Task().train(progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": -1}, r"fit: epochs must be an int of at least 0, got -1"),
        ({"batch_size": 1}, r"fit: batch_size must be an int of at least 2, got 1"),
        ({"patience": 0}, r"fit: patience must be an int of at least 1, got 0"),
        ({"lr": 0.0}, r"fit: lr must be in \(0\.0, inf\], got 0\.0"),
        ({"weight_decay": -1.0}, r"fit: weight_decay must be in \[0\.0, inf\], got -1\.0"),
        ({"warmup": 1.5}, r"fit: warmup must be in \[0\.0, 1\.0\], got 1\.5"),
        ({"precision": "float16"}, r'fit: precision must be "float32" or "bfloat16", got \'float16\''),
    ],
)
def test_options_outside_their_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**given)
