"""Bag of words, TF-IDF, word embeddings and the files of word vectors."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from pycm.text import BagOfWords, Tfidf, WordEmbeddings, load_text_encoder, read_word_vectors

TEXTS = ["The cat sat on the mat", "a dog and a cat", "Dogs chase cats, cats chase mice!", "", "Katze"]
VECTORS = {"cat": [1.0, 2.0, 0.5], "dog": [0.0, -1.0, 2.0], "mat": [3.0, 0.0, 1.0], "sat": [0.5, 0.5, -4.0]}


def embeddings(**options) -> WordEmbeddings:
    return WordEmbeddings(list(VECTORS), list(VECTORS.values()), **options)


# Bag of words and TF-IDF


def tokens(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def test_bag_of_words_counts() -> None:
    pytest.importorskip("sklearn")
    bag = BagOfWords().fit(TEXTS)
    assert bag.words == sorted({token for text in TEXTS for token in tokens(text)})
    expected = [[tokens(text).count(word) for word in bag.words] for text in TEXTS]
    out = bag.encode(TEXTS, batch_size=2)
    assert out.dtype == np.float32
    assert bag.dim == len(bag.words)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(bag.encode(["unknown words"]), np.zeros((1, bag.dim)))
    np.testing.assert_array_equal(BagOfWords(binary=True).fit(TEXTS).encode(TEXTS), np.minimum(expected, 1))


def test_tfidf_formula() -> None:
    pytest.importorskip("sklearn")
    tfidf = Tfidf().fit(TEXTS)
    counts = BagOfWords().fit(TEXTS).encode(TEXTS).astype(np.float64)
    idf = np.log((1 + len(TEXTS)) / (1 + (counts > 0).sum(0))) + 1
    expected = counts * idf
    norms = np.linalg.norm(expected, axis=1, keepdims=True)
    expected = np.divide(expected, norms, out=np.zeros_like(expected), where=norms > 0)
    np.testing.assert_allclose(tfidf.encode(TEXTS), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BagOfWords(ngram_range=(1, 2), stop_words="english"),
        lambda: Tfidf(sublinear_tf=True, analyzer="char_wb", ngram_range=(2, 3)),
        lambda: Tfidf(use_idf=False, norm=None),
        lambda: embeddings(),
        lambda: embeddings(weighting="sif", sif_a=0.1),
        lambda: embeddings(weighting="sif", sif_components=0),
    ],
)
def test_saved_and_loaded(tmp_path: Path, make) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("safetensors")
    one = make().fit(TEXTS)
    one.save(tmp_path / "deep" / "er")
    two = load_text_encoder(tmp_path / "deep" / "er")
    assert type(two) is type(one)
    np.testing.assert_array_equal(one.encode(TEXTS), two.encode(TEXTS))
    assert one.fingerprint == two.fingerprint == type(one).load(tmp_path / "deep" / "er").fingerprint
    assert one.fingerprint != make().fit([*TEXTS[1:], "a mat"]).fingerprint or one.name == "word-embeddings"
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir())[0] == "config.json"


def test_another_format_and_another_class_of_a_name(tmp_path: Path) -> None:
    embeddings().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, but this version of pycm reads 1"):
        load_text_encoder(tmp_path)
    with pytest.raises(TypeError, match=r"pycm\.text has a text descriptor called Tfidf already"):
        type("Tfidf", (WordEmbeddings,), {"__module__": "mine"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert isinstance(load_text_encoder(tmp_path), WordEmbeddings)


def test_loading_what_does_not_belong_together(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    embeddings().save(tmp_path)
    with pytest.raises(ValueError, match="holds a WordEmbeddings"):
        Tfidf.load(tmp_path)
    weights = tmp_path / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"weights\.safetensors: its bytes are not those"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json: not the configuration"):
        load_text_encoder(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_text_encoder(tmp_path / "none")


def test_before_fit_and_wrong_arguments() -> None:
    pytest.importorskip("sklearn")
    for encoder in (BagOfWords(), Tfidf(), embeddings(weighting="sif")):
        assert not encoder.fitted
        with pytest.raises(RuntimeError, match=r"call fit\(texts\) first"):
            encoder.encode(["a"])
        with pytest.raises(RuntimeError, match="fingerprint"):
            _ = encoder.fingerprint
    with pytest.raises(ValueError, match=r"BagOfWords\.fit: empty vocabulary"):
        BagOfWords().fit(["", "..."])
    with pytest.raises(TypeError, match="got a single str"):
        Tfidf().fit("one text")
    with pytest.raises(TypeError, match=r"items\[0\] must be a str, got NoneType"):
        embeddings().encode([None])


# Word embeddings


def test_mean_of_known_words() -> None:
    words = embeddings()
    out = words.encode(["cat dog", "Cat, CAT mat!", "zebra cat", "zebra", ""])
    v = {key: np.array(value) for key, value in VECTORS.items()}
    zero = np.zeros(3)
    expected = [(v["cat"] + v["dog"]) / 2, (2 * v["cat"] + v["mat"]) / 3, v["cat"], zero, zero]
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert out.dtype == np.float32
    assert words.dim == 3


def test_words_are_looked_up_as_written_first_and_in_parts_last() -> None:
    words = WordEmbeddings(["Apple", "apple", "cat", "dog", "well-known", "don't"], np.eye(6))
    found = [words.words[i] for i in words.lookup("Apple APPLE cat-dog Well-known don't dog's (cat)")]
    assert found == ["Apple", "apple", "cat", "dog", "well-known", "don't", "dog", "cat"]


def test_sif_follows_the_paper() -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(30)]
    vectors = rng.normal(size=(30, 8)).astype(np.float32)
    texts = [" ".join(rng.choice(vocabulary, size=rng.integers(1, 9))) for _ in range(50)] + ["unknown"]
    out = WordEmbeddings(vocabulary, vectors, weighting="sif", sif_a=1e-2).fit(texts).encode(texts)

    counts = {word: sum(text.split().count(word) for text in texts) for word in vocabulary}
    total = sum(counts.values())
    rows = []
    for text in texts:
        known = [word for word in text.split() if word in counts]
        weighted = [1e-2 / (1e-2 + counts[w] / total) * vectors[vocabulary.index(w)] for w in known]
        rows.append(np.sum(weighted, axis=0) / len(known) if known else np.zeros(8))
    x = np.array(rows)
    direction = np.linalg.svd(x, full_matrices=False)[2][0]
    np.testing.assert_allclose(out, x - np.outer(x @ direction, direction), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(out[-1], 0)


def test_sif_rows_do_not_depend_on_the_batch() -> None:
    sif = embeddings(weighting="sif").fit(TEXTS)
    alone = np.concatenate([sif.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(sif.encode(TEXTS, batch_size=2), alone, atol=1e-7)
    with pytest.raises(ValueError, match="none of the words of 1 texts is known"):
        embeddings(weighting="sif").fit(["zebra"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [[1.0], [2.0]]), r"vectors must be \[1, D\] for 1 words, not empty, got \[2, 1\]"),
        ((["a", "b"], [[1.0], [np.nan]]), "vector of 'b' holds NaN"),
        ((["a", "a"], [[1.0], [2.0]]), "'a' comes twice"),
        (([], np.zeros((0, 3))), "not empty"),
    ],
)
def test_wrong_vectors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        WordEmbeddings(*arguments)


@pytest.mark.parametrize("wrong", [{"weighting": "max"}, {"sif_a": 0}, {"weighting": "sif", "sif_components": 3}])
def test_wrong_settings(wrong) -> None:
    with pytest.raises(ValueError, match="WordEmbeddings"):
        embeddings(**wrong)


# Files of word vectors

LINES = [f"{word} " + " ".join(map(str, vector)) for word, vector in VECTORS.items()]
GLOVE = "\n".join(LINES) + "\n"


def read(path: Path, **options):
    words, vectors = read_word_vectors(path, **options)
    return dict(zip(words, vectors.tolist(), strict=True))


@pytest.mark.parametrize(
    "content",
    [
        GLOVE,
        f"4 3\n{GLOVE}",
        GLOVE.rstrip("\n"),
        GLOVE.replace("\n", "\r\n"),
        GLOVE.replace(" ", "\t"),
        GLOVE.replace("\n", " \n"),
        "\ufeff" + GLOVE,
        GLOVE + "\n\n",
        GLOVE + "cat 9 9 9\n",
    ],
    ids=["glove", "word2vec", "no end", "crlf", "tabs", "blank at line ends", "mark", "blank lines", "twice"],
)
def test_text_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(content.encode())
    assert read(path) == VECTORS
    with gzip.open(tmp_path / "vectors.gz", "wb") as file:
        file.write(content.encode())
    assert read(tmp_path / "vectors.gz") == VECTORS


def test_words_with_spaces_and_of_digits(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_text("cat 1 2\n. . . 3 4\n2012 5 6\nna\u00efve\u00a0x 7 8\n", encoding="utf-8")
    assert read(path) == {"cat": [1, 2], ". . .": [3, 4], "2012": [5, 6], "na\u00efve\u00a0x": [7, 8]}


def test_vocabulary_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_text(f"4 3\n{GLOVE}")
    assert list(read(path, vocabulary={"mat", "dog"})) == ["dog", "mat"]
    assert list(read(path, limit=2)) == ["cat", "dog"]
    with pytest.raises(ValueError, match="none of the words of the vocabulary"):
        WordEmbeddings.load(path, vocabulary={"zebra"})


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"cat 1 2 3\ndog 1 2\n", 2, "expected a word and 3 numbers, got 3 field"),
        (b"cat 1 2 3\ndog 1 2 x\n", 2, "expected 3 numbers: .*'x'"),
        (b"cat 1 2 3\n\ndog 1 2 3\n", 2, "got an empty line"),
        (b"cat 1 2 3\ndog 1 2 nan\n", 2, "NaN or infinity"),
        (b"cat 1 2 3\ndog 1 2 1e99\n", 2, "NaN or infinity"),
        (b"cat 1 2 3\n\xff\xfe 1 2 3\n", 2, "not UTF-8"),
        (b"3 2\ncat 1 2\ndog 1 2\n", 3, "announces 3 words, the file holds 2"),
        (b"2 3\ncat 1 2\n", 2, "expected a word and 3 numbers"),
        (b"2 0\n", 1, "vectors of 0 numbers"),
        (b"cat\n", 1, "expected a word and its numbers, got 1 field"),
        (b"", 0, "holds no word vectors"),
        (b"\x80\x04pickle", 1, "a pickle, not text"),
    ],
)
def test_broken_files_name_the_line(tmp_path: Path, content: bytes, line: int, message: str) -> None:
    path = tmp_path / "v.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"v\.txt:{line}: .*{message}") as info:
        read(path)
    assert "\n" not in str(info.value)


def test_cut_off_gzip_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "v.gz"
    path.write_bytes(gzip.compress(GLOVE.encode() * 50)[:-20])
    with pytest.raises(ValueError, match=r"v\.gz:\d+: the compressed file is cut off or damaged"):
        read(path)
    for name in ("none.txt", "none.bin", "none.kv"):
        with pytest.raises((FileNotFoundError, ImportError)):
            read(tmp_path / name)


def test_gensim_files(tmp_path: Path) -> None:
    models = pytest.importorskip("gensim.models")
    keyed = models.KeyedVectors(3)
    keyed.add_vectors(list(VECTORS), np.array(list(VECTORS.values()), np.float32))
    keyed.save(str(tmp_path / "v.kv"))
    keyed.save_word2vec_format(str(tmp_path / "v.bin"), binary=True)
    keyed.save_word2vec_format(str(tmp_path / "v.txt"), binary=False)
    for name in ("v.kv", "v.bin", "v.txt"):
        assert read(tmp_path / name) == VECTORS
        assert list(read(tmp_path / name, limit=2, vocabulary={"dog", "mat"})) == ["dog"]
    for name in ("v.kv", "v.bin"):
        (tmp_path / name).write_bytes(b"not such a file\n")
        with pytest.raises(ValueError, match=f"{name}: not a .* file of word vectors"):
            read(tmp_path / name)
    (tmp_path / "cut.bin").write_bytes(b"2 3\ncat " + struct.pack("<3f", 1, 2, 3) + b"dog ")
    with pytest.raises(ValueError, match=r"cut\.bin"):
        read(tmp_path / "cut.bin")


def test_load_takes_files_and_saved_folders(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "v.txt").write_text(GLOVE)
    sif = WordEmbeddings.load(tmp_path / "v.txt", weighting="sif").fit(TEXTS)
    sif.save(tmp_path / "saved")
    again = WordEmbeddings.load(tmp_path / "saved")
    assert again.weighting == "sif"
    assert again.fingerprint == sif.fingerprint
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["class"] == "WordEmbeddings"
