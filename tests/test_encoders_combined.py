"""Encoders made of encoders, and colour histograms."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

from pycm.encoders import Encoder, FeatureCache, ImagePreprocess, ModuleEncoder  # noqa: E402
from pycm.encoders.color import ColorHistogram  # noqa: E402
from pycm.encoders.concat import ConcatEncoder  # noqa: E402
from pycm.encoders.images import UnreadableInputError  # noqa: E402
from pycm.encoders.layers import LayersEncoder  # noqa: E402

PIXELS = [np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8) for i in range(5)]


class Net(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Conv2d(3, 4, 3)
        self.second = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(4, 6, 3))
        self.flat = torch.nn.Linear(6, 5)
        self.unused = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flat(self.second(self.first(x)).mean((2, 3)))


def encoder(seed: int = 0) -> ModuleEncoder:
    return ModuleEncoder(Net(seed), ImagePreprocess(size=(16, 16)), name=f"net{seed}")


def power(x: np.ndarray) -> np.ndarray:
    x = np.sign(x) * np.sqrt(np.abs(x))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("normalize", ["none", "l2", "power"])
def test_layers_by_hand(normalize: str) -> None:
    inner = encoder()
    layers = LayersEncoder(inner, ["second.1", "first", "flat"], normalize=normalize)
    net, preprocess = inner.module, inner.preprocess
    with torch.inference_mode():
        x = torch.stack([preprocess(Image.fromarray(p)) for p in PIXELS])
        first = net.first(x)
        second = net.second(first)
        blocks = [second.mean((2, 3)), first.mean((2, 3)), net.flat(second.mean((2, 3)))]
    blocks = [block.numpy() for block in [*blocks, blocks[-1]]]  # the output is that of "flat"
    if normalize == "power":
        blocks = [power(block) for block in blocks]
    elif normalize == "l2":
        blocks = [block / np.linalg.norm(block, axis=1, keepdims=True) for block in blocks]
    np.testing.assert_allclose(layers.encode(PIXELS), np.concatenate(blocks, axis=1), rtol=1e-4, atol=1e-5)
    assert layers.dim == 6 + 4 + 5 + 5
    without = LayersEncoder(inner, ["first"], normalize=normalize, include_output=False)
    np.testing.assert_allclose(without.encode(PIXELS), blocks[1], rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in net.modules())


def test_layers_fingerprint_and_protocol() -> None:
    base = LayersEncoder(encoder(), ["first"])
    assert isinstance(base, Encoder)
    assert base.fingerprint == LayersEncoder(encoder(), ["first"]).fingerprint
    others = [
        LayersEncoder(encoder(1), ["first"]),
        LayersEncoder(encoder(), ["second"]),
        LayersEncoder(encoder(), ["first"], normalize="l2"),
        LayersEncoder(encoder(), ["first"], include_output=False),
        encoder(),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_layers_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="the network of net0 has no 'third'"):
        LayersEncoder(encoder(), ["first", "third"])
    with pytest.raises(ValueError, match="layers must be a non-empty list of names, got 'first'"):
        LayersEncoder(encoder(), "first")
    with pytest.raises(TypeError, match="encoder must be a TorchEncoder, got Net"):
        LayersEncoder(Net(), ["first"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"layer 'unused' must give a tensor .* got no call"):
        LayersEncoder(encoder(), ["unused"]).encode(PIXELS)


def test_color_histogram_by_loop() -> None:
    colors = np.array([[[255, 0, 0], [250, 5, 5]], [[40, 200, 120], [80, 40, 200]]], dtype=np.uint8)
    # Away from the cells' edges: Pillow rounds hues to 256 steps.
    got = ColorHistogram((6, 2, 2), size=2).encode([colors])[0]
    expected = np.zeros((6, 2, 2))
    for r, g, b in colors.reshape(-1, 3) / 255:
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        expected[int(h * 6), min(int(s * 2), 1), min(int(v * 2), 1)] += 0.25
    np.testing.assert_allclose(got, np.sqrt(expected).ravel(), rtol=1e-6)
    many = ColorHistogram().encode(PIXELS, batch_size=2)
    assert many.shape == (5, ColorHistogram().dim)
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, rtol=1e-6)


def test_color_histogram_arguments() -> None:
    assert isinstance(ColorHistogram(), Encoder)
    assert ColorHistogram().fingerprint == ColorHistogram((12, 3, 3)).fingerprint
    assert ColorHistogram().fingerprint != ColorHistogram(size=47).fingerprint
    with pytest.raises(ValueError, match="bins must be three ints"):
        ColorHistogram((0, 1, 1))
    with pytest.raises(ValueError, match="size must be a positive int, got 0"):
        ColorHistogram(size=0)


def test_color_histogram_names_every_unreadable_image(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("not an image")
    with pytest.raises(UnreadableInputError, match=r"bad\.png") as caught:
        ColorHistogram().encode([tmp_path / "bad.png", PIXELS[0], tmp_path / "gone.png"], batch_size=1)
    assert "gone.png" in str(caught.value)


def test_concat_by_hand() -> None:
    parts = [encoder(), ColorHistogram()]
    a, b = (part.encode(PIXELS) for part in parts)
    both = ConcatEncoder(parts, weights=[2, 0.5])
    expected = np.concatenate([2 * a / np.linalg.norm(a, axis=1, keepdims=True), 0.5 * b], axis=1)
    np.testing.assert_allclose(both.encode(PIXELS), expected, rtol=1e-5, atol=1e-6)
    assert isinstance(both, Encoder)
    assert both.name == "net0+color-histogram"
    assert both.dim == 5 + 108
    assert both.encode([]).shape == (0, 113)
    raw = ConcatEncoder(parts, normalize="none").encode(PIXELS)
    np.testing.assert_array_equal(raw, np.concatenate([a, b], axis=1))
    np.testing.assert_allclose(
        ConcatEncoder(parts, normalize="power").encode(PIXELS)[:, :5], power(a), rtol=1e-5, atol=1e-6
    )


def test_concat_fingerprint_and_cache(tmp_path: Path) -> None:
    one = ConcatEncoder([encoder(), ColorHistogram()])
    others = [
        ConcatEncoder([ColorHistogram(), encoder()]),
        ConcatEncoder([encoder(1), ColorHistogram()]),
        ConcatEncoder([encoder(), ColorHistogram()], weights=[1, 2]),
        ConcatEncoder([encoder(), ColorHistogram()], normalize="power"),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert one.fingerprint == ConcatEncoder([encoder(), ColorHistogram()]).fingerprint
    cached = FeatureCache(tmp_path).encode(one, PIXELS).features
    np.testing.assert_allclose(cached, one.encode(PIXELS), rtol=1e-5, atol=1e-6)


def test_concat_wrong_arguments() -> None:
    from pycm.text import Tfidf

    with pytest.raises(ValueError, match="encoders must not be empty"):
        ConcatEncoder([])
    with pytest.raises(ValueError, match="encoders must be of one modality, got image, text"):
        ConcatEncoder([ColorHistogram(), Tfidf()])
    with pytest.raises(ValueError, match="weights must have 1 entries, one for each encoder, got 2"):
        ConcatEncoder([ColorHistogram()], weights=[1, 2])
    with pytest.raises(ValueError, match="weights must be positive and finite"):
        ConcatEncoder([ColorHistogram()], weights=[0])
    with pytest.raises(ValueError, match="normalize must be one of"):
        ConcatEncoder([ColorHistogram()], normalize="max")  # type: ignore[arg-type]
