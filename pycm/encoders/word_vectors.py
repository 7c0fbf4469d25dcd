"""Reading files of word vectors: GloVe text, word2vec text and binary, gensim KeyedVectors."""

from __future__ import annotations

import gzip
import os
from collections.abc import Container
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from .._optional import require
from .base import Features, progress_bar

WordVectorFormat = Literal["auto", "text", "word2vec-binary", "gensim"]


def read_word_vectors(
    path: str | os.PathLike[str],
    *,
    format: WordVectorFormat = "auto",
    vocabulary: Container[str] | None = None,
    limit: int | None = None,
    progress: bool | None = None,
) -> tuple[list[str], Features]:
    """Words and their vectors, float32 [words, dim], in the file's order.

    Args:
        path: text (optionally gzipped) of one word and its numbers a line, with or without word2vec's header
            line "words dim"; or a word2vec binary file; or a file that gensim's `KeyedVectors.save` wrote.
        format: "auto" takes .bin for word2vec's binary format, .kv for gensim's, all else for text. A gensim
            file is a pickle, which can run code when it is read: load only files that you trust.
        vocabulary: keep these words only.
        limit: read the first so many words only (files are sorted by frequency).
        progress: None shows a bar on a terminal only, True always, False never.

    A word that comes twice keeps its first vector. Words may contain spaces, as some in GloVe do.

    Raises:
        ValueError: a broken file, by name and line.
        OSError: untouched.
        ImportError: gensim is needed (binary formats) and not installed.
    """
    path = Path(path)
    if format not in ("auto", "text", "word2vec-binary", "gensim"):
        raise ValueError(f"read_word_vectors: unknown format {format!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"read_word_vectors: limit must be at least 1, got {limit}")
    if format == "auto":
        format = {".bin": "word2vec-binary", ".kv": "gensim"}.get(path.suffix, "text")  # type: ignore[assignment]
    if format == "text":
        return _read_text(path, vocabulary, limit, progress)
    return _read_gensim(path, format, vocabulary, limit)


def _read_gensim(
    path: Path, format: str, vocabulary: Container[str] | None, limit: int | None
) -> tuple[list[str], Features]:
    keyed: Any = require("gensim.models", None, "WordEmbeddings.load of a binary file").KeyedVectors
    with open(path, "rb"):  # OSError untouched; gensim would take a missing name for an address
        pass
    try:
        if format == "gensim":
            loaded = keyed.load(str(path))
            loaded = getattr(loaded, "wv", loaded)  # a whole Word2Vec model
        else:
            loaded = keyed.load_word2vec_format(str(path), binary=True, limit=limit)
        words, vectors = list(loaded.index_to_key), np.asarray(loaded.vectors, dtype=np.float32)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # gensim raises what its parsers and pickle raise
        raise ValueError(f"{path}: not a {format} file of word vectors: {error}") from error
    chosen = [i for i, word in enumerate(words[:limit]) if vocabulary is None or word in vocabulary]
    return [words[i] for i in chosen], np.ascontiguousarray(vectors[chosen])


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    head = file.read(2)
    file.seek(0)
    if head == b"\x1f\x8b":
        file.close()
        return gzip.open(path, "rb")
    return file


def _read_text(
    path: Path, vocabulary: Container[str] | None, limit: int | None, progress: bool | None
) -> tuple[list[str], Features]:
    words: dict[str, None] = {}
    data = bytearray()
    dim = announced = None
    read = blank = number = 0
    with _open(path) as file:
        try:
            for number, line in enumerate(progress_bar(file, progress=progress, desc=path.name), start=1):
                if number == 1 and line[:1] == b"\x80":
                    raise ValueError(f'{path}:1: a pickle, not text; pass format="gensim" if you trust it')
                fields = _fields(path, number, line)
                if not fields:
                    blank = blank or number
                    continue
                if blank:
                    raise ValueError(f"{path}:{blank}: expected a word and its numbers, got an empty line")
                if number == 1 and len(fields) == 2 and all(field.isdecimal() for field in fields):
                    announced, dim = int(fields[0]), int(fields[1])
                    if dim < 1:
                        raise ValueError(f"{path}:1: the header announces vectors of {dim} numbers")
                    continue
                dim = dim or len(fields) - 1
                if len(fields) <= dim or dim == 0:
                    raise ValueError(
                        f"{path}:{number}: expected a word and {dim or 'its'} numbers, "
                        f"got {len(fields)} field(s): {_shown(line)}"
                    )
                word = " ".join(fields[: len(fields) - dim])
                row = _numbers(path, number, fields[len(fields) - dim :])
                read += 1
                if word not in words and (vocabulary is None or word in vocabulary):
                    words[word] = None
                    data += row.tobytes()
                if read == limit:
                    break
        except (EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}:{number + 1}: the compressed file is cut off or damaged") from error
    if read == 0:
        raise ValueError(f"{path}:{number}: the file holds no word vectors")
    if announced is not None and read != announced and limit is None:
        raise ValueError(f"{path}:{number}: the header announces {announced} words, the file holds {read}")
    return list(words), np.frombuffer(bytes(data), dtype=np.float32).reshape(len(words), dim or 0)


def _fields(path: Path, number: int, line: bytes) -> list[str]:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 text: {_shown(line)}") from error
    # Not split(): words may be, or hold, other white space of Unicode.
    return [field for field in text.rstrip("\r\n").replace("\t", " ").split(" ") if field]


def _numbers(path: Path, number: int, fields: list[str]) -> Features:
    try:
        with np.errstate(over="ignore"):  # infinity is reported below
            row = np.array(fields, dtype=np.float32)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: expected {len(fields)} numbers: {error}") from error
    if not np.isfinite(row).all():
        raise ValueError(f"{path}:{number}: the vector holds NaN or infinity")
    return row


def _shown(line: bytes) -> str:
    return repr(line[:40])[1:]
