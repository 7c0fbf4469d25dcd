"""ModuleEncoder, fingerprints and the registry."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from pycm.encoders import (  # noqa: E402
    Encoder,
    ImagePreprocess,
    ModuleEncoder,
    UnreadableInputError,
    get_encoder,
    known_encoders,
    load_image,
)
from pycm.encoders.fingerprint import digest_of  # noqa: E402

SMALL = ImagePreprocess(size=(16, 16))


class Net(torch.nn.Module):
    """Has all that could make a row depend on its neighbours or on chance: batch norm and dropout."""

    def __init__(self, seed: int = 0, scale: float = 1.0, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=2)
        self.norm = torch.nn.BatchNorm2d(8)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(8, width)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.drop(x)) * self.scale


class OtherCode(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu().amax((2, 3))
        return self.head(self.drop(x)) * self.scale


def images(n: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (20 + i, 31 - i, 3), dtype=np.uint8) for i in range(n)]


def encoder(module: torch.nn.Module | None = None, **options: object) -> ModuleEncoder:
    return ModuleEncoder(Net() if module is None else module, SMALL, name="net", **options)


def by_hand(net: Net, items: list[np.ndarray]) -> np.ndarray:
    """One image at a time, batch norm written out."""
    rows = []
    for item in items:
        pixels = np.asarray(SMALL.resized(load_image(item)), dtype=np.float64) / 255
        x = (pixels - SMALL.mean) / SMALL.std
        x = torch.tensor(x.transpose(2, 0, 1), dtype=torch.float32)[None]
        x = torch.nn.functional.conv2d(x, net.conv.weight, net.conv.bias, stride=2)
        mean, var = net.norm.running_mean, net.norm.running_var
        x = (x - mean[:, None, None]) / torch.sqrt(var + net.norm.eps)[:, None, None]
        x = torch.relu(x).mean((2, 3))
        rows.append((x @ net.head.weight.T + net.head.bias)[0].detach().numpy())
    return np.stack(rows)


def test_features_are_those_of_the_module_in_evaluation_mode() -> None:
    net, items = Net(), images(7)
    out = encoder(net).encode(items, batch_size=3)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, by_hand(net, items), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_a_row_does_not_depend_on_its_batch(batch_size: int) -> None:
    enc, items = encoder(), images(7)
    alone = np.concatenate([enc.encode([item]) for item in items])
    np.testing.assert_allclose(enc.encode(items, batch_size=batch_size), alone, rtol=1e-5, atol=1e-6)


def test_it_is_an_encoder_and_finds_its_dim() -> None:
    enc = encoder(Net(width=9))
    assert isinstance(enc, Encoder)
    assert enc.dim == 9
    assert enc.encode([]).shape == (0, 9)
    assert encoder(dim=5).dim == 5


def test_a_wrong_dim_is_reported() -> None:
    with pytest.raises(ValueError, match=r"dim is 6, but the module gives 5"):
        encoder(dim=6).encode(images(1))


def test_modes_and_statistics_are_as_before() -> None:
    net = Net().train()
    net.norm.eval()  # frozen by the user
    before = {key: value.clone() for key, value in net.state_dict().items()}
    encoder(net).encode(images(3))
    assert net.training
    assert net.drop.training
    assert not net.norm.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_modes_come_back_after_an_error() -> None:
    net = Net().train()
    with pytest.raises(ValueError, match="postprocess"):
        ModuleEncoder(net, SMALL, name="x", postprocess=lambda out: out[0]).encode(images(2))
    assert net.training
    assert net.drop.training


def test_training_mode_does_not_change_features() -> None:
    items = images(4)
    np.testing.assert_array_equal(encoder(Net().train()).encode(items), encoder(Net().eval()).encode(items))


def test_autocast_and_autograd_around_the_call_do_not_matter() -> None:
    enc, items = encoder(), images(2)
    plain = enc.encode(items)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        np.testing.assert_array_equal(enc.encode(items), plain)


def test_half_precision_modules_give_float32() -> None:
    items = images(2)
    out = encoder(Net().to(torch.bfloat16)).encode(items)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, encoder().encode(items), rtol=0.1, atol=0.1)


def test_postprocess_picks_from_an_output_object() -> None:
    class Wrapped(Net):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"embedding": super().forward(x)}

    with pytest.raises(TypeError, match=r"must return a tensor \[B, dim\], got dict"):
        encoder(Wrapped()).encode(images(1))
    out = encoder(Wrapped(), postprocess=lambda out: out["embedding"]).encode(images(2))
    np.testing.assert_array_equal(out, encoder().encode(images(2)))


def test_texts_with_a_tokenizer_that_pads() -> None:
    class Bag(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = torch.nn.Embedding(256, 4)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (self.table(ids) * mask[..., None]).sum(1)

    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        rows = [list(text.encode()) for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
        return {"ids": ids, "mask": mask}

    enc = ModuleEncoder(Bag(), tokenize, name="bag", modality="text")
    texts = ["a", "a longer text", "b"]
    expected = [enc.module.table.weight[list(text.encode())].sum(0).tolist() for text in texts]
    np.testing.assert_allclose(enc.encode(texts, batch_size=2), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError, match=r"items\[1\] must be a str, got int"):
        enc.encode(["a", 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ModuleEncoder(len, SMALL, name="x"), TypeError, "module must be a torch.nn.Module"),
        (lambda: ModuleEncoder(Net(), 3, name="x"), TypeError, "preprocess must be callable, got int"),
        (lambda: ModuleEncoder(Net(), SMALL, name="x", modality="sound"), ValueError, "got 'sound'"),
        (lambda: encoder().encode("a.png"), TypeError, "sequence of items, got a single str"),
        (lambda: encoder().encode(images(1), batch_size=0), ValueError, "positive int, got 0"),
        (lambda: encoder().encode([3]), TypeError, r"items\[0\] must be a path, a PIL image"),
        (lambda: encoder().encode([np.zeros((4, 4, 3))]), TypeError, r"got float64 of shape \(4, 4, 3\)"),
    ],
)
def test_wrong_arguments(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_preprocess_of_two_shapes() -> None:
    def as_it_is(image):
        return torch.zeros(3, image.height, image.width)

    with pytest.raises(ValueError, match=r"one shape, got \[3, 20, 31\] and \[3, 21, 30\]"):
        ModuleEncoder(Net(), as_it_is, name="x").encode(images(2))


def test_every_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    paths = [tmp_path / "gone.png", images(1)[0], tmp_path / "text.png", np.zeros((0, 4, 3), np.uint8)]
    with pytest.raises(UnreadableInputError) as info:
        encoder().encode(paths, batch_size=1)
    assert [name for name, _ in info.value.errors] == [str(paths[0]), str(paths[2]), "items[3]"]
    assert "3 of 4 images" in str(info.value)
    assert "\n" not in str(info.value)


# Fingerprints


def test_equal_encoders_have_equal_fingerprints() -> None:
    assert encoder(Net()).fingerprint == encoder(Net()).fingerprint
    assert encoder(Net().train()).fingerprint == encoder(Net().eval()).fingerprint


def _one_weight_changed() -> Net:
    net = Net()
    with torch.no_grad():
        net.head.bias[2] = torch.nextafter(net.head.bias[2], torch.tensor(9.0))
    return net


def _statistic_changed() -> Net:
    net = Net()
    net.norm.running_var[0] += 1e-3
    return net


@pytest.mark.parametrize(
    "other",
    [
        lambda: encoder(Net(seed=1)),
        lambda: encoder(_one_weight_changed()),
        lambda: encoder(_statistic_changed()),
        lambda: encoder(Net(scale=2.0)),
        lambda: encoder(OtherCode()),
        lambda: encoder(Net().double()),
        lambda: ModuleEncoder(Net(), ImagePreprocess(size=(16, 16), crop=1.0), name="net"),
        lambda: encoder(postprocess=lambda out: out * 2),
    ],
    ids=["weights", "one ulp", "buffer", "attribute", "code", "dtype", "preprocess", "postprocess"],
)
def test_whatever_changes_features_changes_the_fingerprint(other) -> None:
    assert other().fingerprint != encoder().fingerprint


def test_an_edited_forward_of_a_class_of_the_same_name() -> None:
    def define(sign: int) -> Net:
        class Mine(Net):
            if sign > 0:

                def forward(self, x: torch.Tensor) -> torch.Tensor:
                    return super().forward(x)

            else:

                def forward(self, x: torch.Tensor) -> torch.Tensor:
                    return -super().forward(x)

        return Mine()

    assert encoder(define(1)).fingerprint == encoder(define(1)).fingerprint
    assert encoder(define(1)).fingerprint != encoder(define(-1)).fingerprint


GLOBAL = 1.0


def test_functions_are_told_apart_by_code_defaults_closures_and_globals(monkeypatch) -> None:
    def scaled(factor: float):
        return lambda x, power=2: factor * x**power * GLOBAL

    base = digest_of(scaled(2.0))
    assert digest_of(scaled(2.0)) == base
    assert digest_of(scaled(3.0)) != base
    assert digest_of(lambda x, power=2: 2.0 * x**power * GLOBAL) != base
    other = scaled(2.0)
    other.__defaults__ = (3,)
    assert digest_of(other) != base
    monkeypatch.setitem(globals(), "GLOBAL", 2.0)
    assert digest_of(scaled(2.0)) != base


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["ab", "c"], ["a", "bc"]),
        ([1, [2, 3]], [[1, 2], 3]),
        (1, 1.0),
        (1, True),
        ("1", 1),
        (np.zeros(2), np.zeros((2, 1))),
        (np.zeros(2), np.zeros(2, np.float32)),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        (b"a", "a"),
        (None, "None"),
    ],
)
def test_different_values_differ(one, two) -> None:
    assert digest_of(one) != digest_of(two)


def test_cycles_end_and_opaque_objects_raise() -> None:
    loop: list[object] = [1]
    loop.append(loop)
    assert digest_of(loop) == digest_of(loop)
    with pytest.raises(TypeError, match="cannot see into"):
        digest_of(iter([1]))


def test_fingerprints_do_not_depend_on_the_process() -> None:
    program = textwrap.dedent(
        """
        from pycm.encoders.fingerprint import digest_of
        words = {"one", "two", "three", "four"}
        def known(text, a=1.5):
            return text in {"alpha", "beta", "gamma"} or text in words
        print(digest_of(known, words, {"b": {1, 2}, "a": None}, lambda x: x))
        """
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1


# The registry


def test_unknown_encoder_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown encoder 'resnet'; known: ") as info:
        get_encoder("resnet")
    assert all(known in str(info.value) for known in known_encoders())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clip:some/model",), 'two sides; pass modality="image" or "text"'),
        (("clip:",), "lacks a model name, expected clip:NAME"),
        (("words:",), "lacks a model name"),
        (("minilm", "image"), "encodes texts, not images"),
        (("tfidf", "image"), "encodes texts, not images"),
        (("efficientnet-lite0", "text"), "encodes images, not texts"),
        (("minilm", "sound"), "modality must be"),
    ],
)
def test_registry_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        get_encoder(*arguments)


def test_registry_makes_text_encoders(tmp_path: Path) -> None:
    assert get_encoder("tfidf").fit(["a cat"]).dim == 2
    assert get_encoder("bag-of-words", "text").modality == "text"
    (tmp_path / "v.txt").write_text("cat 1 2\n")
    np.testing.assert_array_equal(get_encoder(f"words:{tmp_path}/v.txt").encode(["cat"]), [[1, 2]])


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="TimmBackbone needs timm: pip install timm"):
        get_encoder("timm:resnet18")
