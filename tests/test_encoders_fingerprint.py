"""What determines features is in the fingerprint; what cannot be seen is refused."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import importlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from torch import nn  # noqa: E402

import pycm  # noqa: E402
from pycm.cache import FeatureCache  # noqa: E402
from pycm.encoders import LayersEncoder, ModuleEncoder  # noqa: E402
from pycm.encoders.fingerprint import digest_of  # noqa: E402
from pycm.text import WordEmbeddings  # noqa: E402


class Mode(enum.Enum):
    NEAREST = 0
    BICUBIC = 3


class Holder(nn.Module):
    """Keeps one thing, under a public or a private name."""

    def __init__(self, value: Any, name: str = "value") -> None:
        super().__init__()
        setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.helper(x)

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return x


def buffered(value: float) -> nn.Module:
    module = nn.Module()
    module.register_buffer("scale", torch.tensor([value]), persistent=False)
    return module


def hooked(kind: str, factor: float) -> nn.Module:
    module = nn.Flatten()
    if kind == "forward":
        module.register_forward_hook(lambda m, i, o: o * factor)
    elif kind == "pre":
        module.register_forward_pre_hook(lambda m, i: (i[0] * factor,))
    return module


def convolution(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3, **options)


RELU, TANH = nn.ReLU(), nn.Tanh()


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (lambda: Holder(Mode.BICUBIC), lambda: Holder(Mode.NEAREST)),
        (lambda: Holder(torch.relu), lambda: Holder(torch.tanh)),
        (lambda: Holder(lambda x: x), lambda: Holder(lambda x: 2 * x)),
        (lambda: Holder(2.0, "_scale"), lambda: Holder(3.0, "_scale")),
        (lambda: Holder(torch.ones(2)), lambda: Holder(torch.zeros(2))),
        (lambda: Holder({"a": 1}), lambda: Holder({"a": 2})),
        (lambda: Holder([{"a": torch.ones(2)}]), lambda: Holder([{"a": torch.zeros(2)}])),
        (lambda: Holder("a.npy", "filename"), lambda: Holder("b.npy", "filename")),
        (lambda: Holder({"a": 1}.get), lambda: Holder({"a": 2}.get)),
        (lambda: Holder(np.float32(1)), lambda: Holder(np.float64(1))),
        (lambda: Holder({"a": 1, "b": 2}), lambda: Holder({"b": 2, "a": 1})),
        (lambda: buffered(1.0), lambda: buffered(2.0)),
        (lambda: hooked("", 2), lambda: hooked("forward", 2)),
        (lambda: hooked("forward", 2), lambda: hooked("forward", 3)),
        (lambda: hooked("pre", 2), lambda: hooked("pre", 3)),
        (lambda: hooked("pre", 2), lambda: hooked("forward", 2)),
        (lambda: nn.Sequential(RELU, TANH), lambda: nn.Sequential(RELU, TANH, RELU)),
        (lambda: nn.Sequential(RELU, TANH), lambda: nn.Sequential(TANH, RELU)),
        (convolution, lambda: convolution(padding=1)),
        (convolution, lambda: convolution(padding_mode="reflect")),
        (convolution, lambda: nn.utils.parametrizations.weight_norm(convolution())),
        (lambda: torch.float16, lambda: torch.float32),
        (lambda: collections.defaultdict(int), lambda: collections.defaultdict(float)),
        (lambda: functools.partial(max, 1), lambda: functools.partial(max, 2)),
        (lambda: "a".upper, lambda: "b".upper),
        (lambda: np.vectorize(lambda x: x), lambda: np.vectorize(lambda x: -x)),
        (lambda: functools.lru_cache(lambda x: x), lambda: functools.lru_cache(lambda x: -x)),
        (lambda: torch.no_grad()(lambda x: x), lambda: torch.no_grad()(lambda x: -x)),
    ],
)
def test_what_differs_has_another_digest(one: Any, two: Any) -> None:
    assert digest_of(one()) == digest_of(one())
    assert digest_of(two()) == digest_of(two())
    assert digest_of(one()) != digest_of(two())


def test_the_cache_tells_two_resizes_apart(tmp_path: Path) -> None:
    class Resize(nn.Module):  # keeps an enum, as torchvision's does
        def __init__(self, interpolation: Mode) -> None:
            super().__init__()
            self.interpolation = interpolation

        def forward(self, image: Any) -> torch.Tensor:
            small = image.resize((8, 8), self.interpolation.value)
            return torch.from_numpy(np.asarray(small, np.float32)).permute(2, 0, 1) / 255

    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    cache = FeatureCache(tmp_path)
    for mode in Mode:
        encoder = ModuleEncoder(nn.Flatten(), Resize(mode), name="x")
        np.testing.assert_array_equal(cache.encode(encoder, [image]).features, encoder.encode([image]))


# Code


class Callable0:
    def __call__(self, x: Any) -> Any:
        return self.go(x)

    def go(self, x: Any) -> Any:
        return x

    factor = 1


class Inherits(Callable0):
    pass


@dataclasses.dataclass
class Data:
    size: int = 1

    def __call__(self, x: Any) -> Any:
        return x


@dataclasses.dataclass
class Slotted:
    __slots__ = ("size",)
    size: int


@pytest.mark.parametrize(
    ("make", "kind", "name"),
    [
        (lambda: Holder(1), Holder, "helper"),
        (lambda: nn.Sequential(Holder(1)), Holder, "forward"),
        (Callable0, Callable0, "__call__"),
        (Callable0, Callable0, "go"),
        (Inherits, Callable0, "__call__"),
        (Inherits, Callable0, "go"),
        (Data, Data, "__call__"),
        (lambda: lambda x: Callable0()(x), Callable0, "go"),
    ],
)
def test_edited_methods(make: Any, kind: type, name: str, monkeypatch: Any) -> None:
    before = digest_of(make())
    assert digest_of(make()) == before
    monkeypatch.setattr(kind, name, lambda self, x: x * 2)
    assert digest_of(make()) != before


def test_edited_encoders_of_ones_own(monkeypatch: Any) -> None:
    class Mine(ModuleEncoder):
        def _forward(self, batch: Any) -> Any:
            return super()._forward(batch)

    class Words(WordEmbeddings):
        pass

    def prints() -> list[str]:
        words = Words(["a"], [[1.0]]).fingerprint
        return [Mine(nn.Flatten(), len, name="x").fingerprint, words]

    before = prints()
    assert prints() == before
    monkeypatch.setattr(Mine, "_forward", lambda self, batch: -batch)
    monkeypatch.setattr(Words, "_rows", lambda self, texts: 0, raising=False)
    assert not set(prints()) & set(before)


def test_class_attributes_and_slots(monkeypatch: Any) -> None:
    before = digest_of(Inherits())
    monkeypatch.setattr(Callable0, "factor", 2)
    assert digest_of(Inherits()) != before
    assert digest_of(Slotted(1)) == digest_of(Slotted(1)) != digest_of(Slotted(2))


HELPERS = """
K = {k}
def inner(x): return x * {k}
def crop(x): return inner(x)
class Crop:
    def __call__(self, x): return {k}
"""


@pytest.mark.parametrize(
    "code",
    [
        "from helping.helpers import crop\ndef pre(x): return crop(x)",
        "import helping.helpers\ndef pre(x): return helping.helpers.crop(x)",
        "from helping import helpers as h\ndef pre(x): return h.K * x",
        "def pre(x):\n  from helping.helpers import crop\n  return crop(x)",
        "def pre(x):\n  import helping.helpers as h\n  return [h.crop(y) for y in x]",
        "def pre(x):\n  from .helpers import crop\n  return crop(x)",
        "from .helpers import Crop\ndef pre(x): return Crop()(x)",
        "from .helpers import Crop\npre = Crop()",
        "from . import helpers\npre = [helpers]",
    ],
)
def test_edited_helpers_in_modules_of_ones_own(code: str, tmp_path: Path, monkeypatch: Any) -> None:
    package = tmp_path / "helping"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "main.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def digest(k: int) -> str:
        (package / "helpers.py").write_text(HELPERS.format(k=k))
        for name in [name for name in sys.modules if name.partition(".")[0] == "helping"]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        return digest_of(importlib.import_module("helping.main").pre)

    assert digest(11) == digest(11)
    assert digest(11) != digest(12)


def ping(n: int) -> int:
    return n and pong(n - 1)


def pong(n: int) -> int:
    return n and ping(n - 1)


def test_functions_that_call_each_other() -> None:
    assert digest_of(ping) == digest_of(ping) != digest_of(pong)


# What cannot be seen, and what need not be


LOCK = threading.Lock()
OPAQUE = (i for i in range(3))


@pytest.mark.parametrize(
    "opaque",
    [
        lambda: OPAQUE,
        lambda: Holder(OPAQUE),
        lambda: lambda x: next(OPAQUE),
        lambda: torch.jit.script(nn.Linear(2, 2)),
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.empty(2, device="meta"),
        lambda: np.frompyfunc(lambda x: x, 1, 1),
        lambda: sys.__stderr__,
    ],
)
def test_what_cannot_be_seen_is_refused(opaque: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot see into .*pass fingerprint= to ModuleEncoder"):
        digest_of(opaque())


def test_too_deep_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(TypeError, match="nested too deeply"):
        digest_of(deep)


def test_a_given_fingerprint() -> None:
    module = torch.jit.script(nn.Flatten())

    def pre(image: Any) -> torch.Tensor:
        with LOCK:  # does not matter, and does not stand in the way
            return torch.zeros(3, 2, 2)

    def make(given: str | None) -> ModuleEncoder:
        return ModuleEncoder(module, pre, name="x", fingerprint=given)

    with pytest.raises(TypeError, match="fingerprint="):
        _ = make(None).fingerprint
    assert make("v1").fingerprint == make("v1").fingerprint != make("v2").fingerprint
    assert len(make("v1").fingerprint) == 64
    for wrong in ("", 3):
        with pytest.raises(TypeError, match="fingerprint must be a non-empty str"):
            make(wrong)  # type: ignore[arg-type]
    assert digest_of(pre) == digest_of(pre)


def test_use_does_not_change_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.rnn, self.attention = nn.BatchNorm1d(12), nn.LSTM(12, 4), nn.MultiheadAttention(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, _ = self.rnn(self.norm(x.flatten(1)))
            return self.attention(x, x, x)[0]

    net = Net()
    before = digest_of(net)
    encoder = ModuleEncoder(net, lambda image: torch.ones(3, 2, 2), name="x")
    LayersEncoder(encoder, ["norm"]).encode([np.zeros((4, 4, 3), np.uint8)])
    assert digest_of(net) == digest_of(Net()) == before
    assert digest_of(torch.compile(net)) != digest_of(torch.compile(nn.Flatten()))


def test_modules_and_their_code_do_not_depend_on_the_process(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import enum, logging, torch
        from torch import nn
        from pycm.encoders import ImagePreprocess
        from pycm.encoders.fingerprint import digest_of
        class Mode(enum.Enum):
            A = "a"
            B = {"x", "y", "z"}
        log = logging.getLogger("x")
        class Net(nn.Module):
            names = {"one", "two", "three"}
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.mode, self.act, self.layer = Mode.B, torch.relu, nn.LSTM(3, 4)
                self.layer.register_forward_hook(lambda *a: log.info(Mode.A))
            def forward(self, x):
                return self.act(self.layer(x)[0])
        print(digest_of(Net(), ImagePreprocess(), torch.no_grad()(lambda x: Net()(x))))
        """
    )
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": str(Path(pycm.__file__).parents[1])}
    seen = {
        subprocess.run(
            [sys.executable, "program.py"],
            cwd=tmp_path,
            env=environment | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    assert len(seen.pop().strip()) == 64
