"""The poolings of published video-text and image-text codebases, from their equations, in torch's operators.

Each oracle pools as the codebase does, over what nn.LSTM or nn.GRU gives it, with the same weights.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import types
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
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


def test_hgr() -> None:
    """HGR (Chen et al., 2020): a GRU's directions are averaged; a linear score of each word weighs the sentence, a
    phrase is the maximum of its words; a video's projected frames are weighed as the words are."""
    gru, x = nn.GRU(12, 16, batch_first=True, bidirectional=True), words()
    states = packed_states(gru, x)
    states = (states[..., :16] + states[..., 16:]) / 2

    def weighed(steps: torch.Tensor, score: nn.Linear) -> torch.Tensor:
        scores = score(steps)[..., 0].masked_fill(~mask(), -1e18)
        return (torch.softmax(scores, 1)[..., None] * steps).sum(1)

    score = nn.Linear(16, 1)
    nn.init.constant_(score.bias, 3.0)  # which softmax takes out
    sentences = pycm.nn.TemporalPool.from_torch(gru, "attention", combine="average")
    sentences.attention.load_state_dict({"weight": score.weight})
    same(sentences(x, LENGTHS), weighed(states, score))
    means = (states * mask()[..., None]).sum(1) / LENGTHS[:, None]  # its encoder without attention
    same(pycm.nn.TemporalPool.from_torch(gru, "mean", combine="average")(x, LENGTHS), means)

    phrases = [(0, [1]), (0, [2, 3, 7]), (1, [0, 4]), (3, [3]), (3, [0, 1, 2, 3])]  # sentence, places of its words
    chosen = torch.zeros(len(phrases), int(LENGTHS[0]))
    for row, (_, places) in enumerate(phrases):
        chosen[row, places] = 1
    sentence = torch.tensor([b for b, _ in phrases])
    want = states[sentence].masked_fill(chosen[..., None] == 0, -1e10).amax(1)
    dense = pycm.nn.TemporalPool.from_torch(gru, "none", combine="average")(x, LENGTHS)
    own = torch.cat([dense[b, places] for b, places in phrases])
    same(pycm.pool_states(own, [len(places) for _, places in phrases], "max"), want)

    level, score = nn.Linear(12, 24), nn.Linear(24, 1)
    frames = level(x)
    same(pycm.pool_states(frames, LENGTHS, "attention", attention=score.weight[0]), weighed(frames, score))


def test_mmt() -> None:
    """MMT (Gabeur et al., 2020): a caption is the LSTM's final state, mapped, or the maximum of its word vectors; an
    expert's features are averaged and their maxima taken over the whole clip, zeros where the clip has none."""
    table, lstm, head = nn.Embedding(30, 12), nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 16)
    lengths = torch.tensor([3, 9, 1, 9, 6])
    valid = torch.arange(9) < lengths[:, None]
    ids = torch.randint(1, 30, (5, 9)) * valid
    vectors = table(ids)
    zeros = torch.zeros(1, 5, 16)
    packed = pack_padded_sequence(vectors, (ids != 0).sum(1), batch_first=True, enforce_sorted=False)
    want = head(lstm(packed, (zeros, zeros))[1][0][-1])
    pool = pycm.nn.TemporalPool.from_torch(lstm, "last")
    same(head(pool(ids, lengths, embedding=table.weight)), want)
    with torch.no_grad():
        same(head(pool(ids, lengths, embedding=table.weight)), want)
    same(pycm.pool_states(vectors, lengths, "max"), vectors.masked_fill(~valid[..., None], -torch.inf).amax(1))

    clips = [torch.randn(length, 12) for length in (7, 0, 30)]
    averages = torch.stack([clip.mean(0) if len(clip) else torch.zeros(12) for clip in clips])
    maxima = torch.stack([clip.amax(0) if len(clip) else torch.zeros(12) for clip in clips])
    same(pycm.pool_states(torch.cat(clips), [7, 0, 30], "meanmax"), torch.cat([averages, maxima], 1))


# ---- a trained network on real sound ----

RATE = 16000


@pytest.fixture
def recordings() -> list[tuple[str, np.ndarray]]:
    """(speaker, samples at 16 kHz) of some spoken digits."""
    folder = Path(os.environ.get("PYCM_DATA", "")) / "spoken_digits"
    if not os.environ.get("PYCM_DATA") or not folder.is_dir():
        pytest.skip("PYCM_DATA with spoken_digits is not set")
    found = []
    for path in sorted(folder.glob("*_0.wav")):
        with wave.open(str(path)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
            assert file.getframerate() == RATE // 2
        found.append((path.stem.split("_")[1], scipy.signal.resample_poly(samples, 2, 1)))
    return found


def melspectrogram(*, y: np.ndarray, sr: int, n_fft: int, hop_length: int, n_mels: int) -> np.ndarray:
    """What librosa's has as defaults: power of centred Hann windows in Slaney's bands."""
    from transformers import audio_utils as tools

    filters = tools.mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, sr / 2, sr, norm="slaney", mel_scale="slaney")
    window = tools.window_function(n_fft, "hann")
    return tools.spectrogram(
        y, window, n_fft, hop_length, power=2.0, center=True, pad_mode="constant", mel_filters=filters, mel_floor=0.0
    )


@pytest.fixture
def resemblyzer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package, without its detector of speech, which is not used here, and with the one function of librosa."""
    if importlib.util.find_spec("resemblyzer") is None:
        pytest.skip("resemblyzer is not installed")
    pytest.importorskip("transformers.audio_utils")  # which looks for librosa itself
    feature = types.SimpleNamespace(melspectrogram=melspectrogram)
    for name, parts in {"webrtcvad": {}, "librosa": {"feature": feature}}.items():
        module = types.ModuleType(name)
        module.__dict__.update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    before = {*sys.modules}
    yield importlib.import_module("resemblyzer")
    for name in {*sys.modules} - before:  # what holds the stand-ins is not for others
        if name.split(".")[0] == "resemblyzer":
            del sys.modules[name]


class FinalState(nn.Module):
    """In the place of an nn.LSTM of whose results only the last layer's final state is read."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.pool = pycm.nn.TemporalPool.from_torch(lstm, "last")

    def forward(self, mels: torch.Tensor) -> Any:
        return None, (self.pool(mels, mels.shape[1])[None], None)


def test_trained_speaker_encoder(resemblyzer: Any, recordings: list[tuple[str, np.ndarray]]) -> None:
    """The embeddings of resemblyzer's own encoder, three layers of LSTM, over recordings of different lengths."""
    encoder = resemblyzer.VoiceEncoder("cpu", verbose=False).requires_grad_(False)
    assert encoder.lstm.num_layers == 3
    sounds = [resemblyzer.normalize_volume(sound, -30, increase_only=True) for _, sound in recordings]
    mels = [torch.from_numpy(resemblyzer.wav_to_mel_spectrogram(sound)) for sound in sounds]
    lengths = [len(mel) for mel in mels]
    assert min(lengths) < max(lengths) // 2
    theirs = torch.cat([encoder(mel[None]) for mel in mels])
    states = pycm.nn.TemporalPool.from_torch(encoder.lstm, "last")(torch.cat(mels), lengths)
    same(normalize(torch.relu(encoder.linear(states)), dim=1), theirs)
    module = pycm.nn.TemporalPool.from_torch(encoder.lstm, "last", int8_weights=True)
    rounded = normalize(torch.relu(encoder.linear(module(torch.cat(mels), lengths))), dim=1)
    assert 0.99 < float((rounded * theirs).sum(1).min()) < 0.999999
    speakers = np.array([speaker for speaker, _ in recordings])
    alike, likeness = speakers[:, None] == speakers, (theirs @ theirs.T).numpy()
    np.fill_diagonal(likeness, np.nan)
    assert np.nanmean(likeness[alike]) > np.nanmean(likeness[~alike]) + 0.1  # it hears them

    long = [
        np.concatenate([s for s, name in zip(sounds, speakers, strict=True) if name == one])
        for one in sorted({*speakers})
    ]
    want, parts = zip(*(encoder.embed_utterance(sound, return_partials=True)[:2] for sound in long), strict=True)
    assert min(map(len, parts)) > 1
    encoder.lstm = FinalState(encoder.lstm)
    found = np.stack([encoder.embed_utterance(sound) for sound in long])
    same(torch.from_numpy(found), torch.from_numpy(np.stack(want)))
