"""What fine-tuning refuses: encoders that cannot be trained, and options that do not go with it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL.Image")

from clip_cases import LetterEncoder  # noqa: E402
from tuning_cases import (  # noqa: E402
    CLIPS,
    SHORT,
    TEST,
    TEXTS,
    WORDS,
    appearance,
    as_tensor,
    grey,
    lengths,
    make,
)  # fmt: skip

from pycm.encoders import ModuleEncoder  # noqa: E402
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
    with pytest.raises(ValueError, match="fine_tune and space do not go together"):
        make(text_encoder=lengths(), space=Ridge()).fit(CLIPS, TEXTS, fine_tune="text", **SHORT)
    with pytest.raises(ValueError, match="fine_tune and target_clips do not go together"):
        make().fit(CLIPS, TEXTS, fine_tune="appearance", target_clips=CLIPS, **SHORT)
    with pytest.raises(ValueError, match="fine_tune and unlabelled do not go together"):
        make().fit(CLIPS, TEXTS, fine_tune="appearance", unlabelled=(TEST, WORDS), threshold=0.5, **SHORT)


def test_a_failed_fit_leaves_the_encoder_as_it_was_given() -> None:
    matcher = make().fit(CLIPS, TEXTS, fine_tune="appearance", **SHORT)
    with pytest.raises(ValueError, match="fine_tune must be"):
        matcher.fit(CLIPS, TEXTS, fine_tune="nothing")
    assert not matcher.fitted
    assert matcher.encoders["appearance"] is matcher.streams[0]
