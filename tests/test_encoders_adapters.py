"""Adapters against small, randomly initialised models of the real classes."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from pycm.encoders import (  # noqa: E402
    Encoder,
    ImagePreprocess,
    OpenCLIP,
    TimmBackbone,
    TorchvisionBackbone,
    TransformersCLIP,
    TransformersSigLIP,
    get_encoder,
    get_encoders,
    load_image,
    registry,
)
from pycm.encoders.fingerprint import digest_of  # noqa: E402

TEXTS = ["a cat", "a dog and a cat", "dog", "a a a dog dog and cat", ""]
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8) for i in range(4)]
WORDS = ["<pad>", "<unk>", "a", "cat", "dog", "and", "<bos>", "<eos>"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def load(name: str) -> Any:
    """Import torchvision, or what needs it.

    A torchvision wheel built for another torch lacks its compiled detection operators and then refuses to be
    imported (and transformers, which tries, with it). Its models are Python: the operators are declared so
    that it imports, and none is called here.
    """
    for _ in range(40):
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise ImportError(str(error)) from error
            torch.library.define(f"torchvision::{missing[1]}", "(Tensor x) -> Tensor")
            for module in [m for m in sys.modules if m.split(".")[0] in ("torchvision", "timm", "open_clip")]:
                del sys.modules[module]
    raise AssertionError("torchvision wants ever more operators")


def load_or_skip(name: str) -> Any:
    try:
        return load(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")


with suppress(ImportError):
    load("torchvision")


def tokenizer(length: int, *, pair: bool) -> Any:
    """A real fast tokenizer of eight words; `pair` frames texts in <bos> ... <eos>."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>" if pair else "$A <eos>", special_tokens=[("<bos>", 6), ("<eos>", 7)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=length,
    )


def processor(kind: str, length: int) -> Any:
    transformers = pytest.importorskip("transformers")
    name = f"{kind}ImageProcessor"
    make = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    size = {"height": 32, "width": 32}
    sizes = {"size": size} if kind == "Siglip" else {"size": {"shortest_edge": 32}, "crop_size": size}
    return SimpleNamespace(
        image_processor=make(**sizes, image_mean=list(MEAN), image_std=list(STD)),
        tokenizer=tokenizer(length, pair=kind == "CLIP"),
    )


def config(kind: str, length: int) -> Any:
    transformers = pytest.importorskip("transformers")
    side = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = side | {"vocab_size": len(WORDS), "max_position_embeddings": length}
    text |= {"pad_token_id": 0, "bos_token_id": 6, "eos_token_id": 7}
    projection = {"projection_dim": 16} if kind == "CLIP" else {}
    if kind == "Siglip":
        text["projection_size"] = 32
    return getattr(transformers, f"{kind}Config")(
        text_config=text | projection,
        vision_config=side | {"image_size": 32, "patch_size": 8} | projection,
        **projection,
    )


def built(kind: str, length: int = 12) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config(kind, length)).eval()
    with torch.no_grad():  # away from the initial values, so that a wrong scale or bias shows
        model.logit_scale.fill_(1.7)
        if kind == "Siglip":
            model.logit_bias.fill_(-3.25)
        for parameter in model.text_model.parameters():  # texts differ by more than rounding
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, processor(kind, length)


def cosine(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    images = images / np.linalg.norm(images, axis=1, keepdims=True)
    return images @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T


CASES = [("CLIP", TransformersCLIP), ("Siglip", TransformersSigLIP)]


@pytest.mark.parametrize(("kind", "adapter"), CASES)
def test_logits_are_the_models_own(kind: str, adapter: Any) -> None:
    model, both = built(kind)
    dual = adapter(model, both, name="tiny")
    assert isinstance(dual.image, Encoder)
    assert isinstance(dual.text, Encoder)
    # The oracle: the model's whole forward pass on inputs prepared as its documentation says.
    inputs = both.tokenizer(TEXTS, padding="max_length", max_length=12, return_tensors="pt")
    if kind == "Siglip":
        inputs = {"input_ids": inputs["input_ids"]}
    pixels = both.image_processor([load_image(i) for i in IMAGES], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs, **pixels)
    scores = cosine(dual.image.encode(IMAGES, batch_size=3), dual.text.encode(TEXTS, batch_size=2))
    logits = expected.logits_per_image
    np.testing.assert_allclose(dual.logits(scores), logits.numpy(), rtol=1e-4, atol=1e-4)
    wanted = logits.softmax(1) if kind == "CLIP" else logits.sigmoid()
    np.testing.assert_allclose(dual.probabilities(scores), wanted.numpy(), rtol=1e-4, atol=1e-5)


def cosine_of(dual: Any) -> np.ndarray:
    return cosine(dual.image.encode(IMAGES), dual.text.encode(TEXTS))


@pytest.mark.parametrize(("kind", "adapter"), CASES)
def test_rows_do_not_depend_on_padding(kind: str, adapter: Any) -> None:
    dual = adapter(*built(kind))
    together = dual.text.encode(TEXTS)
    alone = np.concatenate([dual.text.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert np.abs(together[0] - together[2]).max() > 1e-3  # the model is not constant


@pytest.mark.parametrize(("kind", "adapter"), CASES)
@pytest.mark.parametrize("form", ["tensor", "object"])
def test_both_forms_of_get_features(kind: str, adapter: Any, form: str) -> None:
    model, both = built(kind)
    expected = [adapter(model, both).image.encode(IMAGES), adapter(model, both).text.encode(TEXTS)]
    for method in ("get_image_features", "get_text_features"):
        own = getattr(model, method)

        def other(*, own=own, **inputs: Any) -> Any:
            out = own(**inputs)
            tensor = out if isinstance(out, torch.Tensor) else out.pooler_output
            return tensor if form == "tensor" else SimpleNamespace(pooler_output=tensor)

        object.__setattr__(model, method, other)
    dual = adapter(model, both)
    np.testing.assert_array_equal(dual.image.encode(IMAGES), expected[0])
    np.testing.assert_array_equal(dual.text.encode(TEXTS), expected[1])


@pytest.mark.parametrize(("kind", "adapter"), CASES)
def test_saved_and_loaded_by_folder(kind: str, adapter: Any, tmp_path: Any, monkeypatch: Any) -> None:
    transformers = pytest.importorskip("transformers")
    model, both = built(kind)
    model.save_pretrained(tmp_path)
    # AutoProcessor of a folder needs a full processor; the adapter only hands the name on.
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: both)
    dual = adapter(str(tmp_path), device="cpu")
    own = adapter(model, both)
    np.testing.assert_array_equal(dual.text.encode(TEXTS), own.text.encode(TEXTS))
    assert dual.image.fingerprint == own.image.fingerprint
    assert (dual.logit_scale, dual.logit_bias) == (own.logit_scale, own.logit_bias)


def test_fingerprints_of_the_two_sides_and_their_processors() -> None:
    model, both = built("CLIP")
    one, two = TransformersCLIP(model, both), TransformersCLIP(*built("CLIP"))
    assert one.image.fingerprint == two.image.fingerprint != one.text.fingerprint == two.text.fingerprint
    both.image_processor.image_mean = [0.0, 0.0, 0.0]
    changed = TransformersCLIP(model, both)
    assert changed.image.fingerprint != two.image.fingerprint
    assert changed.text.fingerprint == two.text.fingerprint


def test_both_sides_of_one_model_load_and_hash_it_once(monkeypatch: Any) -> None:
    loaded: list[str] = []
    hashed: list[Any] = []

    def load_clip(name: str, *, device: Any = None) -> TransformersCLIP:
        loaded.append(name)
        return TransformersCLIP(*built("CLIP"), device=device, name=name)

    def digest(*parts: Any) -> str:
        hashed.extend(part for part in parts if isinstance(part, torch.nn.Module))
        return digest_of(*parts)

    monkeypatch.setitem(registry._DUAL, "clip", load_clip)
    for module in ("dual", "module"):
        monkeypatch.setattr(f"pycm.encoders.{module}.digest_of", digest)
    image, text = get_encoders("clip:one", "clip:one")
    assert loaded == ["one"]
    assert (image.modality, text.modality) == ("image", "text")
    assert image.module is text.module
    assert image.fingerprint != text.fingerprint
    assert hashed == [image.module]
    other_image, other_text = get_encoders("clip:one", "clip:two", device="cpu")
    assert loaded == ["one", "one", "two"]
    assert other_image.module is not other_text.module
    assert (other_image.fingerprint, other_text.fingerprint) == (image.fingerprint, text.fingerprint)
    image, text = get_encoders("clip:one", "bag-of-words")
    assert (image.modality, text.name) == ("image", "bag-of-words")
    with pytest.raises(ValueError, match="encodes texts, not images"):
        get_encoders("minilm", "minilm")


@pytest.mark.parametrize("family", ["clip", "siglip", "sentence-transformers", "timm", "torchvision", "open_clip"])
def test_a_model_that_cannot_be_loaded_is_named(family: str, monkeypatch: Any) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        logging.getLogger("huggingface_hub.file_download").warning("Retrying in 1s")
        raise OSError("no such model\nand much more about it")

    library, name = {
        "clip": ("transformers", "AutoProcessor.from_pretrained"),
        "siglip": ("transformers", "AutoProcessor.from_pretrained"),
        "sentence-transformers": ("sentence_transformers", "SentenceTransformer"),
        "timm": ("timm", "create_model"),
        "torchvision": ("torchvision.models", "get_model_weights"),
        "open_clip": ("open_clip", "create_model_from_pretrained"),
    }[family]
    target = load_or_skip(library)
    *path, last = name.split(".")
    for part in path:
        target = getattr(target, part)
    monkeypatch.setattr(target, last, fail)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    hub = logging.getLogger("huggingface_hub")
    hub.addHandler(handler)
    before = hub.level
    try:
        with pytest.raises(ValueError, match=r"cannot load 'nope/nope': no such model$"):
            get_encoder(f"{family}:nope/nope", None if family in ("timm", "torchvision") else "text")
    finally:
        hub.removeHandler(handler)
    assert records == []
    assert hub.level == before


def test_clip_arguments() -> None:
    model, both = built("CLIP")
    with pytest.raises(TypeError, match="needs its processor="):
        TransformersCLIP(model)
    with pytest.raises(TypeError, match=r"Linear has no get_image_features\(\)"):
        TransformersCLIP(torch.nn.Linear(2, 2), both)


def test_long_texts_are_cut_at_the_models_length() -> None:
    dual = TransformersCLIP(*built("CLIP"))
    long = " ".join(["cat"] * 40)
    np.testing.assert_allclose(
        dual.text.encode([long]), dual.text.encode([" ".join(["cat"] * 10)]), rtol=1e-4, atol=1e-5
    )


def prepared(preprocess: Any) -> Any:
    return torch.stack([preprocess(load_image(image)) for image in IMAGES])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit"])
def test_torchvision(name: str) -> None:
    models = load_or_skip("torchvision.models")
    torch.manual_seed(0)
    if name == "vit":
        model = models.VisionTransformer(32, 8, 1, 2, 24, 48, num_classes=7)
        torch.nn.init.normal_(model.heads.head.weight)
    else:
        model = models.get_model(name, weights=None, num_classes=7)
    preprocess = ImagePreprocess(size=(32, 32))
    encoder = TorchvisionBackbone(model, preprocess)
    features = encoder.encode(IMAGES, batch_size=3)
    assert features.shape == (4, encoder.dim)
    # The oracle: the model's class scores are its last linear layer applied to the features.
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        scores = model.eval()(prepared(preprocess)).numpy()
        ours = last(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(ours, scores, rtol=1e-4, atol=1e-4)
    assert not last._forward_pre_hooks


def test_torchvision_model_without_a_linear_layer() -> None:
    load_or_skip("torchvision.models")
    with pytest.raises(ValueError, match="no final linear layer"):
        TorchvisionBackbone(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm(name: str) -> None:
    timm = load_or_skip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=7)
    encoder = TimmBackbone(model)
    features = encoder.encode(IMAGES, batch_size=3)
    assert features.shape == (4, encoder.dim)
    data = timm.data.resolve_model_data_config(model)
    assert encoder.preprocess.size == data["input_size"][1:]
    assert encoder.preprocess.crop == data["crop_pct"]
    with torch.no_grad():
        scores = model.eval()(prepared(encoder.preprocess)).numpy()
        ours = model.get_classifier()(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(ours, scores, rtol=1e-4, atol=1e-4)


def test_timm_wants_a_timm_model() -> None:
    with pytest.raises(ValueError, match="Linear has no forward_features"):
        TimmBackbone(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("bias", [None, -4.0])
def test_open_clip(bias: float | None) -> None:
    open_clip = load_or_skip("open_clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        init_logit_bias=bias,
    ).eval()
    tokenize = open_clip.SimpleTokenizer()
    preprocess = ImagePreprocess(size=(32, 32), mean=MEAN, std=STD)
    dual = OpenCLIP(model, preprocess, tokenize)
    with torch.no_grad():
        scores = model.get_logits(prepared(preprocess), tokenize(TEXTS))[0]
    logits = dual.logits(cosine_of(dual))
    np.testing.assert_allclose(logits, scores.numpy(), rtol=1e-4, atol=1e-4)
    wanted = scores.softmax(1) if bias is None else scores.sigmoid()
    np.testing.assert_allclose(dual.probabilities(cosine_of(dual)), wanted.numpy(), rtol=1e-4, atol=1e-5)
    again = OpenCLIP(model, preprocess, open_clip.SimpleTokenizer())
    assert dual.text.fingerprint == again.text.fingerprint != dual.image.fingerprint


def test_open_clip_arguments() -> None:
    with pytest.raises(TypeError, match="needs preprocess= and tokenizer="):
        OpenCLIP(torch.nn.Linear(2, 2))
    load_or_skip("open_clip")
    with pytest.raises(ValueError, match="ARCHITECTURE/PRETRAINED-TAG"):
        OpenCLIP("ViT-B-32")
