"""What all spaces do: protocol, parameters, saving, errors. Their results: test_spaces_oracles.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pycm.spaces import CCA, ConSE, HubnessCorrection, Ridge, Space, load_space
from pycm.spaces.base import BaseSpace

RNG = np.random.default_rng(0)
N, DI, DT = 60, 12, 7
LATENT = RNG.standard_normal((N, 5))
IMAGES = (LATENT @ RNG.standard_normal((5, DI)) + 0.3 * RNG.standard_normal((N, DI)) + 2).astype(np.float32)
TEXTS = (LATENT @ RNG.standard_normal((5, DT)) + 0.3 * RNG.standard_normal((N, DT)) - 1).astype(np.float32)
PROBABILITIES = RNG.dirichlet(np.ones(DI), N).astype(np.float32)

# Every estimator, ready to fit to (PROBABILITIES, TEXTS): ConSE takes nothing but probabilities.
SPACES: dict[str, Callable[[], BaseSpace]] = {
    "ridge": Ridge,
    "ridge-rbf": lambda: Ridge(kernel="rbf", landmarks=20, image_norm="power", center=False),
    "cca": lambda: CCA(dim=4),
    "cca-rbf": lambda: CCA(kernel="rbf", reg=0.01, power=0),
    "conse": lambda: ConSE(np.random.default_rng(1).standard_normal((DI, DT)), top=3),
    "hubness": lambda: HubnessCorrection(CCA(reg=(0.1, 0.2)), k=4),
    "hubness-conse": lambda: HubnessCorrection(ConSE(np.ones((DI, DT)), top=2), k=4),
}


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> BaseSpace:
    return SPACES[request.param]()


def test_satisfies_the_protocol_and_shapes(space: BaseSpace) -> None:
    assert isinstance(space, Space)
    assert space.fit(PROBABILITIES, TEXTS) is space
    x, y = space.transform_images(PROBABILITIES[:5]), space.transform_texts(TEXTS[:9])
    assert x.dtype == y.dtype == np.float32
    assert (len(x), len(y)) == (5, 9)
    assert x.shape[1] == y.shape[1]
    assert space.transform_images(PROBABILITIES[:0]).shape == (0, x.shape[1])
    assert space.transform_texts(TEXTS[:0]).shape == (0, x.shape[1])


def test_ridge_toward_the_identity_is_saved_with_its_scales(tmp_path: Path) -> None:
    space = Ridge(toward="identity").fit(IMAGES, IMAGES[:, ::-1])
    space.save(tmp_path)
    loaded = Ridge.load(tmp_path)
    assert loaded.toward == "identity"
    np.testing.assert_array_equal(loaded.transform_images(IMAGES), space.transform_images(IMAGES))
    np.testing.assert_array_equal(loaded.transform_texts(IMAGES), space.transform_texts(IMAGES))


def test_two_fits_give_the_same_bits(space: BaseSpace) -> None:
    first = space.fit(PROBABILITIES, TEXTS).transform_images(PROBABILITIES)
    second = space.fit(PROBABILITIES.copy(order="F"), TEXTS.copy()).transform_images(PROBABILITIES)
    np.testing.assert_array_equal(first, second)


def test_does_not_change_or_keep_its_inputs(space: BaseSpace) -> None:
    images, texts = PROBABILITIES.copy(), TEXTS.copy()
    before = space.fit(images, texts).transform_images(PROBABILITIES)
    np.testing.assert_array_equal(images, PROBABILITIES)
    np.testing.assert_array_equal(texts, TEXTS)
    images[:], texts[:] = 0.5, 0.5
    np.testing.assert_array_equal(space.transform_images(PROBABILITIES), before)


def test_save_and_load(space: BaseSpace, tmp_path: Path) -> None:
    space.fit(PROBABILITIES, TEXTS).save(tmp_path / "a" / "space")
    assert sorted(os.listdir(tmp_path / "a" / "space")) == ["config.json", "weights.safetensors"]
    for loaded in (load_space(tmp_path / "a" / "space"), type(space).load(tmp_path / "a" / "space")):
        assert type(loaded) is type(space)
        assert repr(loaded) == repr(space)
        np.testing.assert_array_equal(loaded.transform_images(PROBABILITIES), space.transform_images(PROBABILITIES))
        np.testing.assert_array_equal(loaded.transform_texts(TEXTS), space.transform_texts(TEXTS))


def test_params(space: BaseSpace) -> None:
    params = space.get_params(deep=False)
    assert repr(type(space)(**params)) == repr(space)
    with pytest.raises(ValueError, match=f"{type(space).__name__}.set_params: unknown 'depth'; there are: "):
        space.set_params(depth=3)


def test_scikit_learn_can_clone_it(space: BaseSpace) -> None:
    clone = pytest.importorskip("sklearn.base").clone
    copy = clone(space.fit(PROBABILITIES, TEXTS))
    assert copy is not space
    assert repr(copy) == repr(space)
    np.testing.assert_array_equal(
        copy.fit(PROBABILITIES, TEXTS).transform_images(PROBABILITIES), space.transform_images(PROBABILITIES)
    )


@pytest.mark.parametrize("reg", [0.5, (0.1, 0.2), [0.1, 0.2]])
def test_arguments_are_kept_as_they_were_given(reg: Any, tmp_path: Path) -> None:
    space = CCA(np.int64(3), reg)
    assert space.get_params()["reg"] is reg
    space.fit(IMAGES, TEXTS).save(tmp_path)
    np.testing.assert_array_equal(load_space(tmp_path).transform_texts(TEXTS), space.transform_texts(TEXTS))


def test_numbers_of_numpy_are_taken_and_saved(tmp_path: Path) -> None:
    plain = Ridge(2.0, kernel="rbf", gamma=0.5, landmarks=20).fit(IMAGES, TEXTS)
    space = Ridge(np.float32(2), kernel="rbf", gamma=np.float64(0.5), landmarks=np.int64(20)).fit(IMAGES, TEXTS)
    space.save(tmp_path)
    for other in (space, load_space(tmp_path)):
        np.testing.assert_array_equal(other.transform_images(IMAGES), plain.transform_images(IMAGES))
    assert ConSE(np.eye(3), top=np.int32(2)).top == 2
    assert HubnessCorrection(Ridge(), k=np.int16(4)).k == 4
    for wrong in (True, 0, 2.0):
        with pytest.raises(ValueError, match="top must be a positive int"):
            ConSE(np.eye(3), top=wrong)  # type: ignore[arg-type]


def test_parameters_of_an_inner_space() -> None:
    space = HubnessCorrection(Ridge(3.0), k=4).fit(IMAGES, TEXTS)
    assert space.get_params()["space__alpha"] == 3.0
    assert "space__alpha" not in space.get_params(deep=False)
    assert space.set_params(space__alpha=5.0, k=2) is space
    assert (space.space.get_params()["alpha"], space.k) == (5.0, 2)
    assert not space.fitted
    assert not space.space.fitted


def test_a_class_of_the_user_does_not_take_the_place_of_ours(tmp_path: Path) -> None:
    ours = Ridge(3.0).fit(IMAGES, TEXTS)
    ours.save(tmp_path / "ours")
    mine = type("Ridge", (Ridge,), {"__module__": __name__, "__init__": Ridge.__init__})
    mine(3.0).fit(IMAGES, TEXTS).save(tmp_path / "mine")
    assert type(load_space(tmp_path / "ours")) is Ridge
    assert type(load_space(tmp_path / "mine")) is mine


def test_set_params_forgets_the_fit() -> None:
    space = Ridge(3.0).fit(IMAGES, TEXTS)
    assert space.set_params(alpha=5.0) is space
    assert space.get_params()["alpha"] == 5.0
    assert not space.fitted
    with pytest.raises(ValueError, match="alpha must be"):
        space.set_params(alpha=-1)


@pytest.mark.parametrize("name", [name for name in SPACES if name != "conse"])
def test_not_fitted(name: str, tmp_path: Path) -> None:
    space = SPACES[name]()
    kind = type(space).__name__
    for call in (
        lambda: space.transform_images(PROBABILITIES),
        lambda: space.transform_texts(TEXTS),
        lambda: space.save(tmp_path / "x"),
    ):
        with pytest.raises(RuntimeError, match=rf"^{kind}\.\w+: not fitted, call fit"):
            call()
    assert not (tmp_path / "x").exists()


def test_wrong_width_type_and_nan(space: BaseSpace) -> None:
    space.fit(PROBABILITIES, TEXTS)
    bad = PROBABILITIES.copy()
    bad[17, 3] = np.nan
    with pytest.raises(ValueError, match=r"transform_images: image_features row 17 has a NaN"):
        space.transform_images(bad)
    with pytest.raises(ValueError, match=r"image_features row 17 has a NaN"):
        space.fit(bad, TEXTS)
    bad_texts = TEXTS.copy()
    bad_texts[2, 0] = np.inf
    with pytest.raises(ValueError, match=r"transform_texts: text_features row 2 has an infinity"):
        space.transform_texts(bad_texts)
    with pytest.raises(ValueError, match=rf"image_features must have {DI} columns, got {DI - 1}"):
        space.transform_images(PROBABILITIES[:, :-1])
    with pytest.raises(ValueError, match=rf"text_features must have {DT} columns, got {DT - 2}"):
        space.transform_texts(TEXTS[:, :-2])
    with pytest.raises(ValueError, match=r"image_features must have shape \[N, D\], D >= 1, got \[12\]"):
        space.transform_images(PROBABILITIES[0])
    with pytest.raises(TypeError, match="image_features must be floating point, got int64"):
        space.transform_images(np.ones((2, DI), dtype=np.int64))


@pytest.mark.parametrize("name", ["ridge", "cca", "hubness"])
@pytest.mark.parametrize(
    ("texts", "pairs", "weights", "error", "message"),
    [
        (TEXTS[:-1], None, None, ValueError, "must have as many rows, got 60 and 59"),
        (TEXTS, [[0, 0, 0]], None, ValueError, r"pairs must have shape \[P, 2\], got \[1, 3\]"),
        (TEXTS, [[0.0, 1.0]], None, TypeError, "pairs must be integers"),
        (TEXTS, [[0, 0], [1, 60]], None, ValueError, r"pairs row 1: text row must be in \[0, 59\], got 60"),
        (TEXTS, [[-1, 0], [1, 6]], None, ValueError, r"pairs row 0: image row must be in \[0, 59\], got -1"),
        (TEXTS, [[0, 0]], None, ValueError, "at least 2 pairs are needed, got 1"),
        (TEXTS, np.zeros((0, 2)), None, ValueError, "at least 2 pairs are needed, got 0"),
        (TEXTS, None, np.ones(3), ValueError, r"weights must have shape \[60\], got \[3\]"),
        (
            TEXTS,
            [[0, 0], [1, 1]],
            [1.0, 0.0],
            ValueError,
            "weights must be positive and finite, got 0.0 at 1",
        ),
        (
            np.ones_like(TEXTS)[:, :0],
            None,
            None,
            ValueError,
            r"text_features must have shape \[N, D\], D >= 1",
        ),
    ],
)
def test_wrong_pairs(name: str, texts: Any, pairs: Any, weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SPACES[name]().fit(IMAGES, texts, pairs, weights=weights)


@pytest.mark.parametrize("make", [Ridge, CCA])
def test_constant_images(make: Callable[[], BaseSpace]) -> None:
    with pytest.raises(ValueError, match="image_features are all the same row"):
        make().fit(np.ones((5, 3), np.float32), TEXTS[:5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ridge(0), 'alpha must be "auto" or a positive number, got 0'),
        (lambda: Ridge(float("nan")), "alpha must be"),
        (lambda: Ridge(kernel="poly"), "kernel must be linear or rbf, got 'poly'"),  # type: ignore[arg-type]
        (lambda: Ridge(gamma=-1), "gamma must be"),
        (lambda: Ridge(landmarks=0), "landmarks must be"),
        (lambda: Ridge(toward="one"), "toward must be zero or identity, got 'one'"),  # type: ignore[arg-type]
        (lambda: Ridge(toward="identity", center=False), 'center must be True with toward="identity"'),
        (lambda: Ridge(toward="identity").fit(IMAGES, TEXTS), "of one size, got 12 and 7"),
        (lambda: Ridge(image_norm="l1"), "image_norm must be one of none, l2, power"),  # type: ignore[arg-type]
        (lambda: CCA(0), "dim must be None or a positive int, got 0"),
        (lambda: CCA(reg=0), "reg must be a positive number or a pair of them, got 0"),
        (lambda: CCA(reg=(1.0, 1.0, 1.0)), "reg must be"),  # type: ignore[arg-type]
        (lambda: CCA(power=-1), "power must be at least 0, got -1"),
        (lambda: ConSE(np.ones((3, 2)), top=0), "top must be a positive int, got 0"),
        (lambda: ConSE(np.ones((0, 2))), "class_embeddings must not be empty"),
        (lambda: ConSE(np.full((3, 2), np.nan)), "class_embeddings row 0 has a NaN"),
        (lambda: HubnessCorrection(Ridge(), k=0), "k must be a positive int, got 0"),
    ],
)
def test_wrong_arguments(make: Callable[[], BaseSpace], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_torch_features() -> None:
    torch = pytest.importorskip("torch")
    images, texts = torch.tensor(IMAGES, requires_grad=True), torch.tensor(TEXTS)
    got = Ridge().fit(images, texts).transform_images(images)
    np.testing.assert_array_equal(got, Ridge().fit(IMAGES, TEXTS).transform_images(IMAGES))


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_space(tmp_path)
    folder = tmp_path / "space"
    Ridge().fit(IMAGES, TEXTS).save(folder)
    config, weights = folder / "config.json", folder / "weights.safetensors"
    good = json.loads(config.read_text())

    with pytest.raises(ValueError, match=r"CCA.load: .* holds a Ridge"):
        CCA.load(folder)
    for text, message in (
        ("{", "is not the configuration of a space"),
        ("[]", "is not the configuration of a space"),
        (json.dumps({**good, "format": 99}), "has format 99, this version reads 1"),
        (json.dumps({**good, "class": "Slope"}), "names an unknown space 'Slope'"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_space(folder)
    config.write_text(json.dumps(good))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="does not hold the bytes that"):
        load_space(folder)


def test_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Ridge().fit(IMAGES, TEXTS)
    space.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        Ridge(9.0).fit(IMAGES, TEXTS).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
