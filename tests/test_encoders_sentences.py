"""The adapter of sentence-transformers against a small, randomly initialised model."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from test_encoders_adapters import TEXTS, WORDS, tokenizer, torch

from pycm.encoders import SentenceTransformerEncoder


def sentence_model(pooling: str = "mean") -> Any:
    library = pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    import tempfile

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        transformers.BertModel(
            transformers.BertConfig(
                vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=32,
            )
        ).save_pretrained(folder)  # fmt: skip
        tokenizer(32, pair=True).save_pretrained(folder)
        try:  # where sentence-transformers 6 keeps them
            models = importlib.import_module("sentence_transformers.sentence_transformer.modules")
        except ModuleNotFoundError:
            models = importlib.import_module("sentence_transformers.models")
        word = models.Transformer(folder)
        return library.SentenceTransformer(modules=[word, models.Pooling(16, pooling_mode=pooling)], device="cpu")


def test_sentence_transformers() -> None:
    model = sentence_model()
    encoder = SentenceTransformerEncoder(model.train(), name="tiny")
    rows = encoder.encode(TEXTS, batch_size=2)
    assert model.training
    assert rows.shape == (5, encoder.dim) == (5, 16)
    # The oracle: mean of the last hidden states over the real tokens.
    inputs = tokenizer(32, pair=True)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()[0].auto_model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    np.testing.assert_allclose(rows, ((hidden * mask).sum(1) / mask.sum(1)).numpy(), rtol=1e-4, atol=1e-5)
    unit = SentenceTransformerEncoder(model, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit.encode(TEXTS), axis=1), 1, rtol=1e-5)
    prints = {
        encoder.fingerprint,
        unit.fingerprint,
        SentenceTransformerEncoder(model, prompt="q: ").fingerprint,
    }
    prints.add(SentenceTransformerEncoder(sentence_model("max")).fingerprint)
    assert len(prints) == 4
    assert SentenceTransformerEncoder(sentence_model()).fingerprint == encoder.fingerprint
