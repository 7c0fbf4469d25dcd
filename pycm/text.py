"""Text descriptors without a neural network: bag of words, TF-IDF, averaged word embeddings.

Each is an `Encoder` of modality "text" and can be saved to a folder (JSON, and safetensors for arrays).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ._optional import require
from .encoders.base import Features, check_texts
from .encoders.descriptor import TextDescriptor, load_text_encoder
from .encoders.word_vectors import WordVectorFormat, read_word_vectors

__all__ = [
    "BagOfWords",
    "TextDescriptor",
    "Tfidf",
    "WordEmbeddings",
    "load_text_encoder",
    "read_word_vectors",
]

V = TypeVar("V", bound="_Vectorizer")


class _Vectorizer(TextDescriptor):
    _sklearn: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        self._options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
        self._fitted: Any = None

    def _new(self, **more: Any) -> Any:
        module = require("sklearn.feature_extraction.text", "text", type(self).__name__)
        options = self._options | more
        options["ngram_range"] = tuple(options["ngram_range"])
        if options["analyzer"] != "word":  # scikit-learn warns of options that it does not use
            del options["token_pattern"], options["stop_words"]
        return getattr(module, self._sklearn)(dtype=np.float32, **options)

    def fit(self: V, texts: Sequence[str]) -> V:
        """Learn the vocabulary (and TF-IDF's document frequencies) of `texts`.

        Raises ValueError if no word is left after the limits.
        """
        check_texts(f"{type(self).__name__}.fit", texts)
        vectorizer = self._new()
        try:
            vectorizer.fit(texts)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}.fit: {error}") from error
        self._fitted = vectorizer
        return self

    @property
    def fitted(self) -> bool:
        return self._fitted is not None

    @property
    def dim(self) -> int:
        """Number of words (or n-grams) in the vocabulary."""
        self._check_fitted("dim")
        return len(self._fitted.vocabulary_)

    @property
    def words(self) -> list[str]:
        """The word (or n-gram) that each column counts."""
        self._check_fitted("words")
        return [str(word) for word in self._fitted.get_feature_names_out()]

    def _rows(self, texts: list[str]) -> Features:
        rows: Features = self._fitted.transform(texts).toarray()
        return rows

    def _state(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        return {"options": self._options, "words": self.words}, {}

    @classmethod
    def _from_state(cls: type[V], config: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> V:
        self = cls(**config["options"])
        fitted = self._new(vocabulary={word: i for i, word in enumerate(config["words"])})
        fitted.fit([""])  # with a given vocabulary this learns no words
        if "idf" in arrays:
            fitted.idf_ = arrays["idf"]
        self._fitted = fitted
        return self


class BagOfWords(_Vectorizer):
    """Counts of the words of a text (scikit-learn's `CountVectorizer`).

    Args:
        lowercase, analyzer, ngram_range, min_df, max_df, max_features, stop_words, strip_accents,
        token_pattern: as `CountVectorizer` takes them, except for functions, which cannot be saved; words of
            one letter count by default.
        binary: 1 for a word that occurs, however often.
    """

    name = "bag-of-words"
    _sklearn = "CountVectorizer"

    def __init__(
        self,
        *,
        lowercase: bool = True,
        analyzer: Literal["word", "char", "char_wb"] = "word",
        ngram_range: tuple[int, int] = (1, 1),
        min_df: float = 1,
        max_df: float = 1.0,
        max_features: int | None = None,
        stop_words: Literal["english"] | Sequence[str] | None = None,
        strip_accents: Literal["ascii", "unicode"] | None = None,
        token_pattern: str = r"(?u)\b\w+\b",
        binary: bool = False,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__(**options)


class Tfidf(_Vectorizer):
    """Word counts times inverse document frequency (scikit-learn's `TfidfVectorizer`).

    Args:
        lowercase ... token_pattern: as in `BagOfWords`.
        sublinear_tf: 1 + log(count) in place of the count.
        use_idf, smooth_idf: weigh by inverse document frequency, as if one more text held every word.
        norm: rows of unit "l2" or "l1" length, or None.
    """

    name = "tfidf"
    _sklearn = "TfidfVectorizer"

    def __init__(
        self,
        *,
        lowercase: bool = True,
        analyzer: Literal["word", "char", "char_wb"] = "word",
        ngram_range: tuple[int, int] = (1, 1),
        min_df: float = 1,
        max_df: float = 1.0,
        max_features: int | None = None,
        stop_words: Literal["english"] | Sequence[str] | None = None,
        strip_accents: Literal["ascii", "unicode"] | None = None,
        token_pattern: str = r"(?u)\b\w+\b",
        sublinear_tf: bool = False,
        use_idf: bool = True,
        smooth_idf: bool = True,
        norm: Literal["l1", "l2"] | None = "l2",
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__(**options)

    def _state(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        config, arrays = super()._state()
        if self._options["use_idf"]:
            arrays["idf"] = np.asarray(self._fitted.idf_, dtype=np.float64)
        return config, arrays


# Words joined by an apostrophe or a hyphen are looked up whole first, then in parts.
_TOKEN = re.compile(r"\w+(?:['\u2019-]\w+)*")
_PART = re.compile(r"\w+")


class WordEmbeddings(TextDescriptor):
    """The average of a text's word vectors, plain or weighted after SIF.

    SIF (Arora, Liang and Ma 2017, "A simple but tough-to-beat baseline for sentence embeddings"): word w has
    the weight a / (a + p(w)), p being its share of the words of the texts given to `fit`; then the
    projection on the first principal direction (uncentred) of those texts' averages is taken out.

    A word is looked up as written, then in lower case; one with a hyphen or an apostrophe that is not known
    as a whole, by its parts. Unknown words are left out; a text without a known one gives zeros.

    Args:
        words: distinct words.
        vectors: float [len(words), D], finite; kept as float32.
        weighting: "mean" (needs no fit) or "sif".
        sif_a: the a above; the paper's range is 1e-4 to 1e-2.
        sif_components: how many principal directions to take out; the paper takes one, 0 takes none.
    """

    name = "word-embeddings"

    def __init__(
        self,
        words: Sequence[str],
        vectors: npt.ArrayLike,
        *,
        weighting: Literal["mean", "sif"] = "mean",
        sif_a: float = 1e-3,
        sif_components: int = 1,
    ) -> None:
        self.words = list(words)
        self.vectors: Features = np.ascontiguousarray(vectors, dtype=np.float32)
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.words) or 0 in self.vectors.shape:
            raise ValueError(
                f"WordEmbeddings: vectors must be [{len(self.words)}, D] for {len(self.words)} words, "
                f"not empty, got {list(self.vectors.shape)}"
            )
        if not np.isfinite(self.vectors).all():
            row = int(np.flatnonzero(~np.isfinite(self.vectors).all(axis=1))[0])
            raise ValueError(f"WordEmbeddings: the vector of {self.words[row]!r} holds NaN or infinity")
        self._index = {word: i for i, word in enumerate(self.words)}
        if len(self._index) != len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"WordEmbeddings: words must be distinct, {twice!r} comes twice")
        if weighting not in ("mean", "sif"):
            raise ValueError(f'WordEmbeddings: weighting must be "mean" or "sif", got {weighting!r}')
        if not sif_a > 0:
            raise ValueError(f"WordEmbeddings: sif_a must be above 0, got {sif_a}")
        if weighting == "sif" and not 0 <= sif_components < self.vectors.shape[1]:
            raise ValueError(
                f"WordEmbeddings: sif_components must be in [0, {self.vectors.shape[1]}), got {sif_components}"
            )
        self.weighting, self.sif_a, self.sif_components = weighting, float(sif_a), sif_components
        self._weights: npt.NDArray[np.float32] | None = None  # [words]
        self._directions: Features | None = None  # [components, D], orthonormal

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        weighting: Literal["mean", "sif"] = "mean",
        sif_a: float = 1e-3,
        sif_components: int = 1,
        format: WordVectorFormat = "auto",
        vocabulary: Container[str] | None = None,
        limit: int | None = None,
        progress: bool | None = None,
    ) -> WordEmbeddings:
        """From a file of word vectors (GloVe or word2vec text, word2vec binary, gensim), or a saved folder.

        `format`, `vocabulary`, `limit`, `progress` and the errors are those of `read_word_vectors`; a folder
        brings its own settings, and the arguments are not used. Memory: 4 * D bytes
        a word, twice while loading.
        """
        if Path(path).is_dir():
            loaded = load_text_encoder(path)
            if not isinstance(loaded, WordEmbeddings):
                raise ValueError(f"WordEmbeddings.load: {path} holds a {type(loaded).__name__}")
            return loaded
        words, vectors = read_word_vectors(path, format=format, vocabulary=vocabulary, limit=limit, progress=progress)
        if not words:
            raise ValueError(f"WordEmbeddings.load: {path} has none of the words of the vocabulary")
        return cls(words, vectors, weighting=weighting, sif_a=sif_a, sif_components=sif_components)

    @property
    def fitted(self) -> bool:
        """Always true for weighting="mean"."""
        return self.weighting == "mean" or self._weights is not None

    @property
    def dim(self) -> int:
        """Numbers per word vector."""
        return int(self.vectors.shape[1])

    def fit(self, texts: Sequence[str]) -> WordEmbeddings:
        """Learn SIF's word shares and principal directions; nothing to learn for weighting="mean".

        Cost: one pass, and an eigendecomposition of [D, D].

        Raises ValueError if no word of `texts` is known.
        """
        check_texts("WordEmbeddings.fit", texts)
        if self.weighting == "mean":
            return self
        rows = [self.lookup(text) for text in texts]
        counts = np.bincount(np.concatenate([*rows, np.empty(0, np.int64)]), minlength=len(self.words))
        if counts.sum() == 0:
            raise ValueError(f"WordEmbeddings.fit: none of the words of {len(texts)} texts is known")
        self._weights = (self.sif_a / (self.sif_a + counts / counts.sum())).astype(np.float32)
        self._directions = None
        if self.sif_components:
            averages = self._averages(rows)
            _, eigenvectors = np.linalg.eigh(averages.T @ averages)
            self._directions = eigenvectors[:, ::-1][:, : self.sif_components].T.astype(np.float32)
        return self

    def lookup(self, text: str) -> npt.NDArray[np.int64]:
        """Indices into `words` of the text's known words, in order, repeated as they repeat."""
        return np.fromiter(self._known(_TOKEN.findall(text)), dtype=np.int64)

    def _known(self, tokens: Iterable[str]) -> Iterable[int]:
        for token in tokens:
            index = self._find(token)
            if index is not None:
                yield index
            else:
                parts = _PART.findall(token)
                if len(parts) > 1:
                    yield from (i for part in parts if (i := self._find(part)) is not None)

    def _find(self, token: str) -> int | None:
        index = self._index.get(token)
        return self._index.get(token.lower()) if index is None else index

    def _averages(self, rows: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.float64]:
        out = np.zeros((len(rows), self.dim))
        for i, indices in enumerate(rows):
            if len(indices):
                vectors = self.vectors[indices].astype(np.float64)
                if self._weights is not None:
                    vectors *= self._weights[indices, None]
                out[i] = vectors.sum(axis=0) / len(indices)
        return out

    def _rows(self, texts: list[str]) -> Features:
        averages = self._averages([self.lookup(text) for text in texts])
        if self._directions is not None:
            directions = self._directions.astype(np.float64)
            averages -= (averages @ directions.T) @ directions
        return averages.astype(np.float32)

    def _state(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        config = {
            "weighting": self.weighting,
            "sif_a": self.sif_a,
            "sif_components": self.sif_components,
            "words": self.words,
        }
        learned = {"weights": self._weights, "directions": self._directions}
        arrays: dict[str, npt.NDArray[Any]] = {"vectors": self.vectors}
        return config, arrays | {key: value for key, value in learned.items() if value is not None}

    @classmethod
    def _from_state(cls, config: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> WordEmbeddings:
        words = config.pop("words")
        self = cls(words, arrays["vectors"], **config)
        self._weights, self._directions = arrays.get("weights"), arrays.get("directions")
        return self
