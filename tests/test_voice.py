"""The stream `Voice`: states of a speaker encoder, here of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch import nn  # noqa: E402

from pycm.streams import Voice, get_stream  # noqa: E402
from pycm.video import Clip  # noqa: E402

RATE = 16000


def clip(sound: Any, rate: int = RATE) -> Clip:
    return Clip(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1), sound, rate, 1.0, "clip")


def tone(seconds: float, frequency: float = 300.0, rate: int = RATE) -> Any:
    times = np.arange(round(seconds * rate)) / rate
    return (0.1 * np.sin(2 * np.pi * frequency * times) * (1 + np.sin(9 * times))).astype(np.float32)


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, nn.LSTM]:
    torch.manual_seed(0)
    lstm = nn.LSTM(40, 256, 3, batch_first=True)
    path = tmp_path / "weights.pt"
    state = {f"lstm.{name}": value for name, value in lstm.state_dict().items()}
    torch.save({"model_state": {**state, "linear.weight": torch.zeros(2, 2)}}, path)
    return path, lstm


def mel_windows(sound: Any) -> Any:
    """Power in 40 of Slaney's mel bands, of 25 ms every 10 ms, from the definition, at -30 dB of full scale."""
    count = 1 + (len(sound) - 400) // 160
    sound = sound[: 160 * (count - 1) + 400].astype(np.float64)
    sound *= 10**-1.5 / np.sqrt(np.mean(sound**2))
    parts = np.stack([sound[160 * i : 160 * i + 400] for i in range(count)]) * np.hanning(401)[:-1]
    power = np.abs(np.fft.rfft(parts)) ** 2

    def hertz(mel: Any) -> Any:  # linear to 1 kHz, 27 steps a factor of 6.4 from there
        return np.where(mel < 15, 200 * mel / 3, 1000 * 6.4 ** ((mel - 15) / 27))

    edges = hertz(np.linspace(0, 15 + 27 * np.log(8) / np.log(6.4), 42))
    bins = np.linspace(0, 8000, 201)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    filters = np.clip(np.minimum(rising, falling), 0, None) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return (power @ filters.T).astype(np.float32)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_steps_are_states_of_the_layer(weights: tuple[Path, nn.LSTM], layer: int) -> None:
    path, lstm = weights
    sounds = [tone(0.5), tone(0.83, 500.0)]
    got = Voice(layer, stride=3, silence=9.0, weights=path).extract([clip(sound) for sound in sounds])
    below = nn.LSTM(40, 256, layer, batch_first=True)
    below.load_state_dict({name: value for name, value in lstm.state_dict().items() if int(name[-1]) < layer})
    for i, sound in enumerate(sounds):
        read = np.concatenate([np.zeros((25, 40), np.float32), mel_windows(sound)])  # after silence
        with torch.no_grad():
            want = below(torch.from_numpy(read)[None])[0][0, 25::3].numpy()
        np.testing.assert_allclose(got.values[got.cu_seqlens[i] : got.cu_seqlens[i + 1]], want, atol=2e-5)
        times = got.times[got.cu_seqlens[i] : got.cu_seqlens[i + 1]]
        np.testing.assert_allclose(times, 0.0125 + 0.03 * np.arange(len(want)))


def test_loudness_and_neighbours_change_nothing(weights: tuple[Path, nn.LSTM]) -> None:
    stream, sound = Voice(weights=weights[0]), tone(0.6)
    alone = stream.extract([clip(sound)]).values
    beside = stream.extract([clip(tone(0.9, 700.0)), clip(sound), clip(None)], batch_size=2)
    assert np.array_equal(beside.values[beside.cu_seqlens[1] : beside.cu_seqlens[2]], alone)
    assert beside.present.tolist() == [True, True, False]
    np.testing.assert_allclose(stream.extract([clip(sound / 8)]).values, alone, atol=1e-6)
    slower = stream.extract([clip(tone(0.6, rate=8000), 8000)]).values  # resampled
    np.testing.assert_allclose(slower[3:-3], alone[3:-3], atol=0.05)


def test_silence_is_left_out(weights: tuple[Path, nn.LSTM]) -> None:
    quiet = np.zeros(RATE // 2, np.float32)
    steps = Voice(stride=1, weights=weights[0]).extract([clip(np.concatenate([quiet, tone(0.5), quiet]))])
    assert 45 <= len(steps.values) <= 54
    assert 0.47 < steps.times.min() < steps.times.max() < 1.03


def test_an_utterance_does_not_depend_on_what_was_said_before(weights: tuple[Path, nn.LSTM]) -> None:
    said = tone(0.4, 500.0)

    def steps(before: Any, seconds: float, **options: Any) -> Any:
        """Of what is `said` after `before` and a pause."""
        silence = np.zeros(round(seconds * RATE), np.float32)
        found = Voice(weights=weights[0], **options).extract([clip(np.concatenate([before, silence, said]))])
        own = found.times > (len(before) + len(silence)) / RATE - 0.02
        return found.values[own], found.times[own] - seconds

    nothing, other = np.zeros(RATE // 2, np.float32), tone(0.5, 900.0) / 2
    alone, times = steps(nothing, 0.3)
    assert 15 <= len(alone) <= 23
    for before in (tone(0.5), other):
        for got, want in zip(steps(before, 0.3), (alone, times), strict=True):
            assert np.array_equal(got, want)
    for read_on in (steps(other, 0.1), steps(other, 0.3, pause=0.5), steps(other, 0.3, pause=np.inf)):
        assert np.abs(read_on[0][:5] - alone[:5]).max() > 1e-3


def test_silent_sounds(weights: tuple[Path, nn.LSTM]) -> None:
    stream = Voice(weights=weights[0])
    nothing = stream.extract([clip(None), clip(np.empty(0, np.float32))])
    assert nothing.present.tolist() == [False, False]
    zeros = stream.extract([clip(np.zeros(RATE // 4, np.float32))])
    assert len(zeros.times) > 10
    assert np.isfinite(zeros.values).all()


def test_what_it_is_made_of_is_in_the_fingerprint(weights: tuple[Path, nn.LSTM], tmp_path: Path) -> None:
    path = weights[0]
    other = tmp_path / "other.pt"
    known = torch.load(path)["model_state"]
    torch.save({"model_state": {name: value + 1 for name, value in known.items()}}, other)
    settings: list[dict[str, Any]] = [{}, {"layer": 1}, {"stride": 1}, {"silence": 2.0}, {"pause": 0.3}]
    streams = [*(Voice(weights=path, **own) for own in settings), Voice(weights=other)]
    assert len({stream.fingerprint for stream in streams}) == 6
    assert Voice(weights=path, name="other").fingerprint == streams[0].fingerprint


def test_bad_settings_and_weights(weights: tuple[Path, nn.LSTM], tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match="Voice: layer must be an int from 1 to 3, got 4"):
        Voice(4, weights=weights[0])
    with pytest.raises(ValueError, match="Voice: stride must be an int from 1, got 0"):
        Voice(stride=0, weights=weights[0])
    with pytest.raises(ValueError, match="silence must be positive"):
        Voice(silence=0.0, weights=weights[0])
    with pytest.raises(ValueError, match=r"Voice: pause must be positive, got -0\.1"):
        Voice(pause=-0.1, weights=weights[0])
    torch.save({"model_state": {}}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match=r"empty\.pt does not hold the weights of a speaker encoder"):
        Voice(weights=tmp_path / "empty.pt")
    with pytest.raises(FileNotFoundError):
        Voice(weights=tmp_path / "missing.pt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps resemblyzer"):
        get_stream("voice")
