"""The poolings of published video-text and image-text codebases, from their equations, in torch's operators.

Each oracle pools as the codebase does, over what nn.LSTM or nn.GRU gives it, with the same weights.
"""

from __future__ import annotations

import importlib.util
import math
import os
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import temporal_cases as cases
from tolerances import TEMPORAL

import pycm

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

LENGTHS = torch.tensor([9, 9, 6, 4, 1])  # falling, as the older of them need it


def words(features: int = 12) -> torch.Tensor:
    """Padded with zeros, as their loaders do."""
    return torch.from_numpy(cases.pad(cases.sequences(LENGTHS.tolist(), features), fill=0.0)).float()


def packed_states(rnn: Any, x: torch.Tensor) -> torch.Tensor:
    return pad_packed_sequence(rnn(pack_padded_sequence(x, LENGTHS, batch_first=True))[0], batch_first=True)[0]


def mask() -> torch.Tensor:
    return torch.arange(int(LENGTHS[0])) < LENGTHS[:, None]


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TEMPORAL["float32"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_vsepp() -> None:
    """VSE++ (Faghri et al., 2018): a GRU's output at each caption's last word, divided by its norm."""
    gru, x = nn.GRU(12, 16, batch_first=True), words()
    last = packed_states(gru, x)[torch.arange(len(LENGTHS)), LENGTHS - 1]
    same(pycm.nn.TemporalPool.from_torch(gru, "last", normalize=True)(x, LENGTHS), normalize(last, dim=1))


def test_scan() -> None:
    """SCAN (Lee et al., 2018): every word is the average of both directions, divided by its norm."""
    gru, x = nn.GRU(12, 16, batch_first=True, bidirectional=True), words()
    states = packed_states(gru, x)
    states = normalize((states[..., :16] + states[..., 16:]) / 2, dim=-1) * mask()[..., None]
    same(pycm.nn.TemporalPool.from_torch(gru, "none", combine="average", normalize_states=True)(x, LENGTHS), states)


def test_vse_infinity() -> None:
    """VSE∞ (Chen et al., 2021): averaged directions, then coefficients of the ranks, from a GRU over the ranks."""
    gru, x = nn.GRU(12, 16, batch_first=True, bidirectional=True), words()
    module = pycm.nn.TemporalPool.from_torch(gru, "gpo", combine="average", normalize=True)
    rank_gru, linear = nn.GRU(32, 32, batch_first=True, bidirectional=True), nn.Linear(32, 1, bias=False)
    names = {f"gru.{k}": v for k, v in rank_gru.state_dict().items()} | {"linear.weight": linear.weight}
    module.gpo.load_state_dict(names)  # the names of its checkpoints

    steps = int(LENGTHS[0])
    place = torch.arange(steps)[:, None]
    frequency = torch.exp(torch.arange(0, 32, 2) * -(math.log(10000.0) / 32))
    sines = torch.zeros(steps, 32)
    sines[:, 0::2], sines[:, 1::2] = torch.sin(place * frequency), torch.cos(place * frequency)
    ranks = packed_states(rank_gru, sines.expand(len(LENGTHS), steps, 32))
    scores = linear((ranks[..., :32] + ranks[..., 32:]) / 2)
    weights = torch.softmax(scores.masked_fill(~mask()[..., None], -10000) / 0.1, 1)
    states = packed_states(gru, x)
    states = (states[..., :16] + states[..., 16:]) / 2
    ordered = states.masked_fill(~mask()[..., None], -10000).sort(1, descending=True).values
    pooled = (ordered.masked_fill(~mask()[..., None], 0) * weights).sum(1)
    same(module(x, LENGTHS), normalize(pooled, dim=1))
    same(module.gpo(states, LENGTHS), pooled)  # and over regions that no RNN has seen


def test_clip4clip() -> None:
    """CLIP4Clip's sequential head (Luo et al., 2021): h + x, each frame over its norm, masked mean, over its norm."""
    lstm, x = nn.LSTM(12, 12, batch_first=True), words()
    frames = packed_states(lstm, x) + x
    frames = frames / frames.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    valid = mask()[..., None].float()
    video = (frames * valid).sum(1) / valid.sum(1)
    video = video / video.norm(dim=-1, keepdim=True)
    head = pycm.nn.TemporalPool.from_torch(lstm, "mean", residual=True, normalize_states=True, normalize=True)
    same(head(x, LENGTHS), video)


def test_dual_encoding() -> None:
    """Dual Encoding (Dong et al., 2019): videos run over the padding, captions are packed; both mean their steps."""
    gru, x = nn.GRU(12, 16, batch_first=True, bidirectional=True), words()
    over_padding = gru(x)[0]
    videos = torch.stack([row[:length].mean(0) for row, length in zip(over_padding, LENGTHS, strict=True)])
    same(pycm.nn.TemporalPool.from_torch(gru, "mean", legacy_padding=True)(x, LENGTHS), videos)
    texts = torch.stack([row[:length].mean(0) for row, length in zip(packed_states(gru, x), LENGTHS, strict=True)])
    same(pycm.nn.TemporalPool.from_torch(gru, "mean")(x, LENGTHS), texts)
    assert (videos - texts).abs().max() > 1e-3  # the padding is no detail


def test_attention_over_both_directions() -> None:
    """Global attention as in HGR (Chen et al., 2020): one score a word, softmax over the words, weighted sum."""
    lstm, x = nn.LSTM(12, 16, batch_first=True, bidirectional=True), words()
    module = pycm.nn.TemporalPool.from_torch(lstm, "attention")
    states = packed_states(lstm, x)
    scores = (states @ module.attention.weight[0]).masked_fill(~mask(), -torch.inf)
    pooled = (torch.softmax(scores, 1)[..., None] * states).sum(1)
    same(module(x, LENGTHS), pooled)
    same(module.attention(states, LENGTHS), pooled)


def test_max_over_words() -> None:
    """MMT (Gabeur et al., 2020) and its like: the largest value of each feature over the valid steps."""
    lstm, x = nn.LSTM(12, 16, num_layers=2, batch_first=True), words()
    want = packed_states(lstm, x).masked_fill(~mask()[..., None], -torch.inf).amax(1)
    same(pycm.nn.TemporalPool.from_torch(lstm, "max")(x, LENGTHS), want)


# ---- a trained network on real sound ----


def recordings() -> list[tuple[str, np.ndarray]]:
    """(speaker, samples at 16 kHz) of some spoken digits."""
    folder = Path(os.environ.get("PYCM_DATA", "")) / "spoken_digits"
    if not os.environ.get("PYCM_DATA") or not folder.is_dir():
        pytest.skip("PYCM_DATA with spoken_digits is not set")
    found = []
    for path in sorted(folder.rglob("*_[01].wav"))[:60]:
        with wave.open(str(path)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
        doubled = np.interp(np.arange(2 * len(samples)) / 2, np.arange(len(samples)), samples)
        found.append((path.stem.split("_")[1], doubled))
    return found


def mel_frames(samples: np.ndarray) -> np.ndarray:
    """Energies in 40 bands, 25 ms every 10 ms: [T, 40], as the encoder takes them."""
    count = 1 + max(0, len(samples) - 400) // 160
    samples = np.pad(samples, (0, max(0, 400 - len(samples))))
    pieces = np.stack([samples[160 * i : 160 * i + 400] for i in range(count)]) * np.hanning(401)[:-1]
    power = np.abs(np.fft.rfft(pieces)) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42) / 2595) - 1)
    frequency = np.linspace(0, 8000, 201)
    rising = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
    bands = np.clip(np.minimum(rising, falling), 0, None) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return (power @ bands.T).astype(np.float32)


def test_trained_speaker_encoder() -> None:
    """resemblyzer's three-layer LSTM: final state, linear map, relu, norm. The same embeddings; they tell speakers."""
    package = importlib.util.find_spec("resemblyzer")
    if package is None or not package.submodule_search_locations:
        pytest.skip("resemblyzer is not installed")
    known = recordings()
    weights = torch.load(Path(package.submodule_search_locations[0]) / "pretrained.pt", map_location="cpu")[
        "model_state"
    ]
    lstm, linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)
    for name, module in (("lstm", lstm), ("linear", linear)):
        module.load_state_dict({k.removeprefix(f"{name}."): w for k, w in weights.items() if k.startswith(f"{name}.")})
    parts = [torch.from_numpy(mel_frames(samples)) for _, samples in known]
    encoder = pycm.nn.TemporalPool.from_torch(lstm, "last")
    with torch.no_grad():
        pooled = encoder(torch.cat(parts), [len(part) for part in parts])
        ours = normalize(torch.relu(linear(pooled)), dim=1)
        theirs = torch.stack([normalize(torch.relu(linear(lstm(part[None])[1][0][-1])), dim=1)[0] for part in parts])
    same(ours, theirs)
    speakers = np.array([speaker for speaker, _ in known])
    likeness = (ours @ ours.T).numpy()
    alike = speakers[:, None] == speakers
    np.fill_diagonal(likeness, np.nan)
    assert np.nanmean(likeness[alike]) > np.nanmean(likeness[~alike]) + 0.1
