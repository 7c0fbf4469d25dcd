"""pycm.compat.sentence_transformers beside sentence_transformers.util: the same calls on both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compat_peers import RTOL, assert_close, assert_same_error, only_pycm, outcome, parameters

torch = pytest.importorskip("torch")
util = pytest.importorskip("sentence_transformers.util")

import pycm.compat.sentence_transformers as ours  # noqa: E402

NAMES = ours.__all__
SCORES = ("cos_sim", "dot_score", "euclidean_sim")
ORIGINALS = (*(f"_{name}" for name in NAMES),)


def rows(count: int, dim: int = 24, seed: int = 0, dtype: Any = torch.float32) -> Any:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def clusters(count: int, centres: int, noise: float, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, 32, generator=generator)
    pick = torch.randint(centres, (count,), generator=generator)
    return middle[pick] + noise * torch.randn(count, 32, generator=generator)


Q, C = rows(23, seed=1), rows(317, seed=2)


def assert_same_search(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b)
    for mine, theirs in zip(a, b, strict=True):
        assert [set(m) for m in mine] == [{"corpus_id", "score"}] * len(theirs)
        assert [type(m["corpus_id"]) for m in mine] == [int] * len(mine)
        assert [type(m["score"]) for m in mine] == [float] * len(mine)
        assert [m["corpus_id"] for m in mine] == [m["corpus_id"] for m in theirs]
        scale = max((abs(m["score"]) for m in theirs), default=0)
        np.testing.assert_allclose(
            [m["score"] for m in mine], [m["score"] for m in theirs], rtol=RTOL, atol=RTOL * scale
        )


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    same = {getattr(ours, score): getattr(util, score) for score in SCORES}
    assert parameters(getattr(ours, name), same) == parameters(getattr(util, name))


# ---- score matrices ----


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_scores(name: str, dtype: Any) -> None:
    a, b = Q.to(dtype), C.to(dtype)
    with only_pycm(ours, *ORIGINALS):
        mine = getattr(ours, name)(a, b)
    assert_close(mine, getattr(util, name)(a, b))


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_arrays_lists_and_vectors(name: str) -> None:
    frozen = C.numpy().copy()
    frozen.flags.writeable = False
    cases = [
        (Q.numpy(), C.numpy()),
        (Q.numpy(), C),
        (Q.tolist(), C.tolist()),
        (list(Q), list(C)),
        (list(Q.numpy()), frozen),
        (Q[0], C),
        (Q[0], C[1]),
        (Q.numpy()[::2, ::-1].copy()[:, ::2], C[:, ::2]),
    ]
    for a, b in cases:
        with only_pycm(ours, *ORIGINALS):
            mine = getattr(ours, name)(a, b)
        assert_close(mine, getattr(util, name)(a, b))


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_sparse_rows(name: str) -> None:
    sparse = (C * (C > 1)).to_sparse()
    assert_close(getattr(ours, name)(Q, sparse), getattr(util, name)(Q, sparse))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Q, C[:, :5]),
        (Q.long(), C.long()),
        (Q, C.double()),
        (Q[None], C),
        ("text", C),
        ([[1.0, 2.0], [3.0]], C),
        (Q.numpy()[::-1], C),
    ],
    ids=["dim", "integers", "dtypes", "3d", "text", "ragged", "negative strides"],
)
def test_scores_of_what_does_not_fit(name: str, a: Any, b: Any) -> None:
    theirs = outcome(getattr(util, name), a, b)
    if isinstance(theirs, torch.Tensor):  # dot products of integers
        assert torch.equal(getattr(ours, name)(a, b), theirs)
    else:
        assert_same_error(getattr(ours, name), getattr(util, name), a, b)


@pytest.mark.parametrize("name", SCORES)
def test_gradients(name: str) -> None:
    gradients = []
    for module in (ours, util):
        a, b = Q.double().requires_grad_(), C.double().requires_grad_()
        (getattr(module, name)(a, b) * torch.linspace(-1, 1, len(C))).sum().backward()
        gradients.append((a.grad, b.grad))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_autocast_and_forward_derivatives_are_torchs() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours.cos_sim(Q, C), util.cos_sim(Q, C))
    for name in ("cos_sim", "dot_score"):  # torch has none for cdist
        mine, theirs = (torch.func.jvp(getattr(module, name), (Q, C), (Q, 2 * C)) for module in (ours, util))
        torch.testing.assert_close(mine, theirs)


def test_equal_rows_are_0_apart() -> None:
    far = C + 1000
    assert (ours.euclidean_sim(far, far).diagonal() == 0).all()


def test_tiny_rows_have_a_direction() -> None:
    """The original divides by 1e-12 at least."""
    tiny, unit = torch.tensor([[3e-15, 4e-15]]), torch.tensor([[1.0, 0]])
    assert ours.cos_sim(tiny, unit).item() == pytest.approx(0.6)
    assert util.cos_sim(tiny, unit).item() < 0.01
    assert ours.cos_sim(0 * tiny, unit).item() == util.cos_sim(0 * tiny, unit).item() == 0


# ---- semantic_search ----


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 7, 317, 1000])
def test_semantic_search(score: str, dtype: Any, top_k: int) -> None:
    q, c = Q.to(dtype), C.to(dtype)
    theirs = util.semantic_search(q, c, top_k=top_k, score_function=getattr(util, score))
    for function in (getattr(ours, score), getattr(util, score)):
        with only_pycm(ours, *ORIGINALS):
            mine = ours.semantic_search(q, c, top_k=top_k, score_function=function)
        if dtype == torch.float32 and top_k < 100:
            assert_same_search(mine, theirs)
        else:  # all of 317 in order: some neighbours are closer than the tolerance
            for a, b, query in zip(mine, theirs, q, strict=True):
                exact = getattr(util, score)(query.double(), c.double())[0]
                found = [m["corpus_id"] for m in a]
                assert len(set(found)) == len(found) == len(b)
                scale = float(exact.abs().max())
                np.testing.assert_allclose([m["score"] for m in a], [m["score"] for m in b], rtol=0, atol=RTOL * scale)
                np.testing.assert_allclose([m["score"] for m in a], exact[found], rtol=0, atol=RTOL * scale)


def test_semantic_search_of_arrays_lists_and_vectors() -> None:
    theirs = util.semantic_search(Q, C)
    for q, c in [(Q.numpy(), C), (Q, C.numpy()), (Q.tolist(), C.tolist()), (list(Q), list(C.numpy()))]:
        with only_pycm(ours, *ORIGINALS):
            assert_same_search(ours.semantic_search(q, c), theirs)
    assert_same_search(ours.semantic_search(Q[3], C), theirs[3:4])
    assert_same_search(ours.semantic_search(Q.clone().requires_grad_(), C, 5, 50, 10, ours.cos_sim), theirs)
    assert ours.semantic_search(Q[:0], C) == util.semantic_search(Q[:0], C) == []


def test_semantic_search_hands_the_rest_to_the_original() -> None:
    def negative(a: Any, b: Any) -> Any:
        return -util.dot_score(a, b)

    sparse = (C * (C > 0)).to_sparse()
    for args, options in [
        ((Q, C), {"score_function": negative}),
        ((Q, C), {"score_function": util.manhattan_sim}),
        ((Q, sparse), {}),
        ((Q, C.half()), {}),
        ((Q.round().int(), C.round().int()), {"score_function": util.dot_score, "top_k": 1}),
    ]:
        with pytest.raises(AssertionError, match="handed to the original"), only_pycm(ours, "_semantic_search"):
            ours.semantic_search(*args, **options)
        expected = util.semantic_search(*args, **options)
        assert [[m["score"] for m in row] for row in ours.semantic_search(*args, **options)] == [
            [m["score"] for m in row] for row in expected
        ]
    for options in ({"top_k": 0}, {"query_chunk_size": -1}):
        assert ours.semantic_search(Q, C, **options) == util.semantic_search(Q, C, **options)
    assert ours.semantic_search(Q, C[:0]) == util.semantic_search(Q, C[:0]) == [[]] * len(Q)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((Q, C[:, :4]), {}),
        ((Q.int(), C.int()), {}),
        ((Q, C.double()), {}),
        ((Q, C), {"top_k": -1}),
        ((Q, C), {"top_k": 1.5}),
        ((Q, C), {"top_k": True}),
        ((Q, C), {"corpus_chunk_size": 0}),
        ((Q, C), {"score_function": None}),
        (("text", C), {}),
        ((Q, None), {}),
    ],
)
def test_semantic_search_errors(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    assert_same_error(ours.semantic_search, util.semantic_search, *args, **options)


def test_semantic_search_ties_and_nan() -> None:
    c = torch.tensor([[1.0, 0], [0, 1], [1, 0], [float("nan"), 0], [2, 0]])
    found = ours.semantic_search(torch.tensor([[1.0, 0], [float("nan"), 1]]), c, top_k=5)
    assert found[0] == [{"corpus_id": i, "score": s} for i, s in ((0, 1.0), (2, 1.0), (4, 1.0), (1, 0.0))]
    assert found[1] == []


# ---- paraphrase mining ----


def assert_same_pairs(a: list[Any], b: list[Any]) -> None:
    assert [[type(x) for x in pair] for pair in a] == [[float, int, int]] * len(a)
    assert [tuple(pair[1:]) for pair in a] == [tuple(pair[1:]) for pair in b]
    np.testing.assert_allclose(
        [p[0] for p in a], [p[0] for p in b], rtol=RTOL, atol=RTOL * max((abs(p[0]) for p in b), default=0)
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 1}, {"max_pairs": 50}, {"top_k": 500, "max_pairs": 7}])
def test_paraphrase_mining(score: str, options: dict[str, int]) -> None:
    rows_ = clusters(90, 12, 0.7)
    theirs = util.paraphrase_mining_embeddings(rows_, score_function=getattr(util, score), **options)
    assert len(theirs) > 5
    with only_pycm(ours, *ORIGINALS):
        mine = ours.paraphrase_mining_embeddings(rows_, score_function=getattr(ours, score), **options)
        assert_same_pairs(mine, theirs)
        assert ours.paraphrase_mining_embeddings(rows_.numpy(), score_function=getattr(util, score), **options) == mine


def test_paraphrase_mining_of_duplicates() -> None:
    """A row's own duplicates push it out of its list: it is never its own paraphrase."""
    rows_ = torch.cat([C[:1].expand(6, -1), C[1:4]])
    mine = ours.paraphrase_mining_embeddings(rows_, top_k=4)
    assert [p[1:] for p in mine[:14]] == [[i, j] for i in range(5) for j in range(i + 1, 6)][:14]
    assert [p[0] for p in mine[:14]] == [1.0] * 14
    assert all(i < j for _, i, j in mine)


def test_paraphrase_mining_hands_the_rest_to_the_original() -> None:
    for args in [(C[:0],), (C[:1],), (C[:9], 5000, 100000, 500000, 0), (C[:9], 5, 7, 0), (C[:9], 5, 7, -3)]:
        assert ours.paraphrase_mining_embeddings(*args) == util.paraphrase_mining_embeddings(*args) == []
    fraction = {"max_pairs": 2.5}
    assert_same_pairs(
        ours.paraphrase_mining_embeddings(C, **fraction), util.paraphrase_mining_embeddings(C, **fraction)
    )
    assert_same_error(ours.community_detection, util.community_detection, C, "0.5")
    custom = {"score_function": util.manhattan_sim}
    assert ours.paraphrase_mining_embeddings(C, **custom) == util.paraphrase_mining_embeddings(C, **custom)
    assert_same_error(ours.paraphrase_mining_embeddings, util.paraphrase_mining_embeddings, C, query_chunk_size=0)
    assert_same_error(ours.paraphrase_mining_embeddings, util.paraphrase_mining_embeddings, C.long())


def test_paraphrase_mining_of_sentences() -> None:
    class Model:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def encode(self, sentences: list[str], **options: Any) -> Any:
            self.calls.append((sentences, options))
            return clusters(len(sentences), 5, 0.5)

    mine, theirs = Model(), Model()
    call: dict[str, Any] = {"top_k": 5, "batch_size": 7, "truncate_dim": 16, "prompt": "p", "prompt_name": "n"}
    sentences = [str(i) for i in range(40)]
    assert_same_pairs(
        ours.paraphrase_mining(mine, sentences, **call), util.paraphrase_mining(theirs, sentences, **call)
    )
    assert mine.calls == theirs.calls


# ---- community_detection ----


@pytest.mark.parametrize(
    "options", [{}, {"threshold": 0.9}, {"threshold": 0.6, "min_community_size": 2}, {"threshold": -1.0}]
)
def test_community_detection(options: dict[str, Any]) -> None:
    embeddings = clusters(300, 9, 0.35)
    theirs = util.community_detection(embeddings, **options)
    assert theirs
    for kind in (embeddings, embeddings.numpy(), embeddings.tolist(), embeddings.double()):
        with only_pycm(ours, *ORIGINALS):
            mine = ours.community_detection(kind, **options)
        assert [[type(i) for i in community] for community in mine] == [[int] * len(c) for c in theirs]
        assert mine == theirs


def test_community_detection_of_random_rows() -> None:
    for seed in range(20):
        embeddings = rows(60, 3, seed)
        assert ours.community_detection(embeddings, 0.8, 3) == util.community_detection(embeddings, 0.8, 3)


def test_community_detection_edges() -> None:
    for args in [(C[:0],), (C[:5],), (C[0],), ([],), (C, 0.99)]:
        assert ours.community_detection(*args) == util.community_detection(*args) == []
    assert ours.community_detection(C[0], 0.5, 1) == util.community_detection(C[0], 0.5, 1) == [[0]]
    for args in [(C, 0.5, 0), (C, 0.5, -1), (C.long(), 0.5), (C, 0.5, 2, 0), (C[None].expand(20, -1, -1),), (None,)]:
        assert_same_error(ours.community_detection, util.community_detection, *args)


def test_community_detection_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    ours.community_detection(clusters(50, 3, 0.3), show_progress_bar=True)
    assert "0/50" in capsys.readouterr().err
    ours.community_detection(clusters(50, 3, 0.3))
    assert capsys.readouterr().err == ""
