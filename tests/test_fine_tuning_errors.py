"""What fine-tuning refuses: encoders that cannot be trained, and options that do not go with it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL.Image")

from clip_cases import LetterEncoder  # noqa: E402
from tuning_cases import (  # noqa: E402
    CLIPS,
    SHORT,
    TEST,
    TEXTS,
    CellEncoder,
    GreyNet,
    WordNet,
    appearance,
    as_tensor,
    grey,
    lengths,
    make,
    quarters,
)  # fmt: skip

from pycm.encoders import ModuleEncoder  # noqa: E402
from pycm.encoders.module import TorchEncoder  # noqa: E402
from pycm.matchers import RegionTextMatcher  # noqa: E402
from pycm.matchers.learning import Pairs  # noqa: E402
from pycm.spaces import Ridge  # noqa: E402
from pycm.streams import Appearance, PixelDifferences, encode_clips  # noqa: E402


@pytest.mark.parametrize(
    ("fine_tune", "message"),
    [
        ("text", r"fine_tune='text': 'letters', a LetterEncoder, is no torch module; trainable here: appearance"),
        ("pixel-differences", r"fine_tune='pixel-differences': the stream 'pixel-differences' has no encoder"),
    ],
)
def test_what_cannot_be_trained(fine_tune: str, message: str) -> None:
    matcher = make(appearance(), PixelDifferences(4), text_encoder=LetterEncoder())
    with pytest.raises(TypeError, match=rf"VideoTextMatcher\.fit: {message}"):
        matcher.fit(CLIPS, TEXTS, fine_tune=fine_tune, **SHORT)


def test_unknown_names_and_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="fine_tune must be 'all' or of appearance, text, got 'image'"):
        make(text_encoder=LetterEncoder()).fit(CLIPS, TEXTS, fine_tune="image", **SHORT)
    with pytest.raises(TypeError, match="fine_tune must be a name, a sequence of names or None, got True"):
        make().fit(CLIPS, TEXTS, fine_tune=True, **SHORT)
    with pytest.raises(ValueError, match="fine_tune='all': nothing can be trained: the stream 'pixel-differences'"):
        make(PixelDifferences(4)).fit(CLIPS, TEXTS, fine_tune="all", **SHORT)
    frozen = grey()
    frozen.module.requires_grad_(False)
    with pytest.raises(TypeError, match="the module of 'grey' has no parameter with requires_grad; trainable: any"):
        make(Appearance(frozen)).fit(CLIPS, TEXTS, fine_tune="appearance", **SHORT)
    half = Appearance(ModuleEncoder(torch.nn.Linear(2, 2).half(), as_tensor, name="half"))
    with pytest.raises(TypeError, match=r"the module of 'half' has weights of torch.float16, to be made float32"):
        make(half).fit(CLIPS, TEXTS, fine_tune="appearance", **SHORT)


def test_what_does_not_go_together() -> None:
    features = encode_clips([appearance()], CLIPS, progress=False)
    with pytest.raises(ValueError, match="fine_tune='appearance' needs the clips themselves, got a ClipFeatures"):
        make().fit(features, TEXTS, fine_tune="appearance", **SHORT)
    with pytest.raises(ValueError, match="fine_tune and space do not go together: space is fitted to features that"):
        make(text_encoder=lengths(), space=Ridge()).fit(CLIPS, TEXTS, fine_tune="text", **SHORT)
    with pytest.raises(ValueError, match="fine_tune and target_clips do not go together: target_clips is fitted to"):
        make().fit(CLIPS, TEXTS, fine_tune="appearance", target_clips=CLIPS, **SHORT)


def test_a_failed_fit_leaves_the_encoder_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = make().fit(CLIPS, TEXTS, fine_tune="appearance", **(SHORT | {"epochs": 1}))
    before = matcher.embed_clips(TEST)
    with pytest.raises(ValueError, match="fine_tune must be"):
        matcher.fit(CLIPS, TEXTS, fine_tune="nothing")
    np.testing.assert_array_equal(matcher.embed_clips(TEST), before)  # an argument's error costs nothing
    monkeypatch.setattr(Pairs, "loss", lambda *given: torch.tensor(torch.nan))
    with pytest.raises(ValueError, match=r"is nan; try a smaller lr than 0\.01, or a smaller encoder_lr than 0\.03"):
        matcher.fit(CLIPS, TEXTS, fine_tune="appearance", **SHORT)
    assert not matcher.fitted
    assert matcher.encoders["appearance"] is matcher.streams[0]


def test_regions_keep_their_fit_after_an_argument_error() -> None:
    images, _, texts = quarters(8, 0)
    matcher = RegionTextMatcher(CellEncoder(), WordNet(), dim=4, progress=False)
    matcher.fit(images, texts, fine_tune="image", epochs=1, validation=None)
    with pytest.raises(ValueError, match="fine_tune must be"):
        matcher.fit(images, texts, fine_tune="nothing")
    assert matcher.fitted
    assert matcher.encoders["image"] is not matcher.image_encoder


def test_a_name_that_two_have() -> None:
    matcher = make(Appearance(grey(), name="text"), text_encoder=lengths())
    with pytest.raises(ValueError, match=r"fit: fine_tune needs different names, but 'text' is a stream's and an enc"):
        matcher.fit(CLIPS, TEXTS, fine_tune="text", **SHORT)


@pytest.mark.parametrize("form", [lambda head: head, lambda head: lambda rows: head(rows)])
def test_weights_beside_the_module(form: Any) -> None:
    """A module, which the copy has a copy of; and a closure, whose weights are the caller's."""
    body, head = GreyNet().eval(), torch.nn.Linear(6, 6)
    stream = Appearance(ModuleEncoder(body, as_tensor, name="two", dim=6, postprocess=form(head)))
    short = SHORT | {"validation": None, "epochs": 1}
    with pytest.raises(TypeError, match=r"'two' uses weights \[6, 6\] that are not its module's \(in postpr"):
        make(stream, batch_size=4).fit(CLIPS[:8], TEXTS[:8], fine_tune="appearance", **short)
    assert head.weight.grad is None
    head.requires_grad_(False)
    make(stream, batch_size=4).fit(CLIPS[:8], TEXTS[:8], fine_tune="appearance", **short)


def test_state_that_is_no_tensor() -> None:
    class Extra(GreyNet):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    stream = Appearance(ModuleEncoder(Extra().eval(), as_tensor, name="extra", dim=6, fingerprint="f"))
    with pytest.raises(TypeError, match="the module of 'extra' has a state beside its tensors"):
        make(stream).fit(CLIPS, TEXTS, fine_tune="appearance", **SHORT)


def test_a_method_without_gradients_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    images, _, texts = quarters(4, 0)
    calls: list[int] = []
    for kind, method, name in ((CellEncoder, "encode_grid", "image"), (WordNet, "encode_tokens", "text")):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "_steps", TorchEncoder._steps)
            patch.setattr(kind, method, lambda self, *given, **options: calls.append(1))
            with pytest.raises(TypeError, match=rf"RegionTextMatcher\.fit: fine_tune: \w+\.{method} has no gradients"):
                RegionTextMatcher(CellEncoder(), WordNet()).fit(images, texts, fine_tune=name)
    assert not calls


def test_preprocess_runs_once_at_a_time() -> None:
    running: list[int] = []
    most: list[int] = []

    def slow(image: Any) -> Any:
        running.append(1)
        most.append(len(running))
        time.sleep(0.001)
        running.pop()
        return as_tensor(image)

    stream = Appearance(ModuleEncoder(GreyNet().eval(), slow, name="slow", dim=6, fingerprint="slow"))
    short = SHORT | {"validation": None, "epochs": 1}
    make(stream, batch_size=3).fit(CLIPS[:16], TEXTS[:16], fine_tune="appearance", **short)
    assert max(most) == 1
