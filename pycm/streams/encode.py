"""`encode_clips`: clips to the sequences of several streams, through the cache where there is one."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..encoders.base import check_batch_size, progress_bar
from ..encoders.cache import FeatureCache, cannot_write, content_key
from ..encoders.images import UnreadableInputError
from ..encoders.store import Steps, StepStore
from ..video import (
    CLIPS_VERSION,
    MAX_BYTES,
    Clip,
    ClipItem,
    Sampling,
    check_clips,
    check_workers,
    clip_name,
    read_clips,
)
from .base import DerivedStream, Stream
from .registry import get_streams
from .sequences import Sequences

#: A folder or a cache; None: features are not kept.
Cache: TypeAlias = "str | os.PathLike[str] | FeatureCache | None"


@dataclass(frozen=True, eq=False)
class ClipFeatures:
    """What `encode_clips` returns: B clips as the sequences of several streams.

    Attributes:
        streams: by name, each of B sequences.
        names: of the clips: paths, or what they are called.
        kept: int64 [B], ascending: clip b is the item clips[kept[b]].
        errors: (name, reason) of each clip left out; empty unless on_error="skip".
        seconds: "decode": what encoding waited for decoding, which goes on beside it; "encode": the streams.
        fingerprints: of the streams, where known.
    """

    streams: dict[str, Sequences]
    names: list[str]
    kept: npt.NDArray[np.int64]
    errors: list[tuple[str, str]] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.streams:
            raise ValueError("ClipFeatures: streams is empty")
        for name, sequences in self.streams.items():
            if len(sequences) != len(self.names):
                raise ValueError(
                    f"ClipFeatures: stream {name!r} must have {len(self.names)} sequences, got {len(sequences)}"
                )

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Any) -> ClipFeatures:
        """The clips `rows` (integers, or a mask [B]), in that order; their `kept` count within this object's items."""
        chosen = np.arange(len(self))[np.asarray(rows, dtype=None if len(rows) else np.int64)]
        streams = {name: sequences.take(chosen) for name, sequences in self.streams.items()}
        names = [self.names[i] for i in chosen]
        return ClipFeatures(streams, names, self.kept[chosen], fingerprints=self.fingerprints)

    @classmethod
    def joined(cls, parts: Sequence[ClipFeatures]) -> ClipFeatures:
        """The clips of several, one after another, `kept` counting through. Raises ValueError for unlike streams."""
        if not parts:
            raise ValueError("ClipFeatures.joined: parts is empty")
        about = [{name: sequences.dim for name, sequences in part.streams.items()} for part in parts]
        unlike = next((other for other in about if other != about[0]), None)
        if unlike is not None:
            raise ValueError(f"ClipFeatures.joined: streams must be alike, got {about[0]} and {unlike}")
        streams = {name: Sequences.joined([part.streams[name] for part in parts]) for name in about[0]}
        names = [name for part in parts for name in part.names]
        return cls(streams, names, np.arange(len(names), dtype=np.int64))

    def select(self, streams: Sequence[str]) -> ClipFeatures:
        """The same clips with some of the streams. Raises KeyError for one that is not there."""
        chosen = {name: self.streams[name] for name in streams}
        return ClipFeatures(chosen, self.names, self.kept, self.errors, self.seconds, self.fingerprints)


def encode_clips(
    streams: Sequence[Stream | str],
    clips: Sequence[ClipItem],
    *,
    sampling: str | Sampling = "uniform:16",
    size: int | None = 256,
    sample_rate: int = 16000,
    max_bytes: int = MAX_BYTES,
    cache: Cache = None,
    workers: int | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> ClipFeatures:
    """Decode and encode clips; one decoding serves all streams.

    With a cache nothing is computed twice: sequences are kept by the clip's content (SHA-256), the stream's fingerprint
    and the sampling, a group of clips at a time, so that a run that was killed goes on from there. Equal clips are
    encoded once. A damaged file of the cache is reported by a RuntimeWarning, and its clips encoded again.

    Args:
        streams: streams, or specs of `get_stream`.
        clips: paths, files' bytes, or decoded `Clip`s, which are taken as they are.
        sampling, size, sample_rate, max_bytes, workers: as `pycm.video.read_clips`; sound is read where a stream
            needs it.
        cache: a `FeatureCache` or its folder.
        batch_size: frames that go through a network at a time.
        progress: None shows a bar on a terminal only, True always, False never.
        on_error: what to do with clips that cannot be read. All are tried in either case, and the readable ones are
            encoded and kept. "raise" then raises; "skip" lists the others in `.errors`.

    Raises:
        UnreadableInputError: naming every unreadable clip, with the reason; also where none can be read.
        OSError: the cache cannot be written to. What was written before is kept.
        ValueError: a stream that gives NaN or infinity (the clip is named, its features are not kept) or another number
            of sequences than clips; wrong arguments.
        TypeError: wrong arguments.

    Memory: the features, and some 4 * batch_size frames beside what `read_clips` holds.
    """
    function = "encode_clips"
    check_batch_size(function, batch_size)
    check_clips(function, clips)
    check_workers(function, workers)
    if on_error not in ("raise", "skip"):
        raise ValueError(f'{function}: on_error must be "raise" or "skip", got {on_error!r}')
    plan = Sampling.parse(sampling)
    chosen = get_streams(streams)
    if not chosen:
        raise ValueError(f"{function}: streams is empty")
    keep = FeatureCache(cache) if isinstance(cache, (str, os.PathLike)) else cache
    reading: dict[str, Any] = {"size": size, "sample_rate": sample_rate, "max_bytes": max_bytes, "workers": workers}
    job = _Job(function, chosen, plan, reading, keep, batch_size)
    keys, reasons = job.keys(clips)
    job.run(clips, keys, reasons, progress)

    errors = [(clip_name(clips[i], i), reasons[i]) for i in sorted(reasons)]
    kept = np.array([i for i in range(len(clips)) if i not in reasons], dtype=np.int64)
    if errors and (on_error == "raise" or not len(kept)):
        raise UnreadableInputError(errors, len(clips), "clips")
    sequences = {stream.name: job.sequences(stream, [keys[i] for i in kept]) for stream in chosen}
    names, prints = [clip_name(clips[i], i) for i in kept], {stream.name: stream.fingerprint for stream in chosen}
    return ClipFeatures(sequences, names, kept, errors, job.seconds, prints)


class _Part:
    """A stream to be computed from the clips: what is known of it, by clip, and where it is kept."""

    def __init__(self, stream: Stream, store: StepStore | None) -> None:
        self.stream, self.store = stream, store
        self.known: dict[bytes, Steps] = {}


class _Job:
    def __init__(
        self, function: str, streams: Sequence[Stream], plan: Sampling, reading: Mapping[str, Any],
        cache: FeatureCache | None, batch_size: int,
    ) -> None:  # fmt: skip
        self.function, self.plan, self.reading = function, plan, reading
        self.cache, self.batch_size = cache, batch_size
        self.seconds = {"decode": 0.0, "encode": 0.0}
        self.stamps: list[tuple[int, int] | None] = []
        self.parts: dict[str, _Part] = {}
        for stream in streams:
            origin = _origin(stream)
            if origin.fingerprint not in self.parts:
                self.parts[origin.fingerprint] = _Part(origin, self._store(origin))

    def _store(self, stream: Stream) -> StepStore | None:
        if self.cache is None:
            return None
        reading = self.reading
        how = f"{reading['sample_rate']} Hz" if stream.needs_sound else f"{self.plan}, {reading['size']} pixels"
        return self.cache.steps(stream.name, stream.fingerprint, f"clips: {how}")

    def keys(self, clips: Sequence[ClipItem]) -> tuple[list[bytes], dict[int, str]]:
        """A key for each clip, and the reasons of those that have none."""
        keys: list[bytes] = []
        reasons: dict[int, str] = {}
        for i, clip in enumerate(clips):
            self.stamps.append(_stamp(clip))
            try:
                keys.append(clip_key(clip) if self.cache else b"%d" % i)
            except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
                keys.append(b"")
                reasons[i] = getattr(error, "strerror", None) or str(error)
        return keys, reasons

    def run(self, clips: Sequence[ClipItem], keys: list[bytes], reasons: dict[int, str], progress: bool | None) -> None:
        """Fill `known` of all parts; adds to `reasons`."""
        first = {key: i for i, key in reversed(list(enumerate(keys))) if i not in reasons}
        for part in self.parts.values():
            if part.store is not None:
                part.known = part.store.read(list(first))
        todo = sorted(i for key, i in first.items() if any(key not in part.known for part in self.parts.values()))
        if not todo:
            return
        short = [p.stream for p in self.parts.values() if any(keys[i] not in p.known for i in todo)]
        # Where sound alone is missing, one picture is enough.
        plan = self.plan if any(not s.needs_sound for s in short) else Sampling("uniform", 1)
        reader = read_clips(
            [clips[i] for i in todo], plan, sound=any(s.needs_sound for s in short), on_error="skip", **self.reading
        )
        try:
            group: list[tuple[bytes, Clip]] = []
            clock = time.perf_counter()
            for at, clip in progress_bar(reader, progress=progress, total=len(todo), desc="clips"):
                self.seconds["decode"] += time.perf_counter() - clock
                i = todo[at]
                if self.cache is not None and _stamp(clips[i]) != self.stamps[i]:
                    reasons[i] = "it changed while it was being read"
                else:
                    group.append((keys[i], clip))
                if sum(len(c.frames) for _, c in group) >= 4 * self.batch_size:
                    self._encode(group)
                    group = []
                clock = time.perf_counter()
            self.seconds["decode"] += time.perf_counter() - clock
            self._encode(group)
        finally:
            reader.close()
        failed = {keys[todo[at]]: error.reason for at, error in reader.errors}
        failed |= {keys[i]: reasons[i] for i in todo if i in reasons}
        reasons |= {i: failed[key] for i, key in enumerate(keys) if key in failed}
        for part in self.parts.values():
            if part.store is not None:
                self._guarded(part.store.merge)

    def _encode(self, group: list[tuple[bytes, Clip]]) -> None:
        clock = time.perf_counter()
        for part in self.parts.values():
            todo = [(key, clip) for key, clip in group if key not in part.known]
            if todo:
                self._extract(part, [key for key, _ in todo], [clip for _, clip in todo])
        self.seconds["encode"] += time.perf_counter() - clock

    def _extract(self, part: _Part, keys: list[bytes], clips: list[Clip]) -> None:
        name = part.stream.name
        sequences = part.stream.extract(clips, batch_size=self.batch_size)
        if len(sequences) != len(clips) or sequences.dim != part.stream.dim:
            raise ValueError(
                f"{self.function}: stream {name!r} must give {len(clips)} sequences of {part.stream.dim} features, "
                f"got {len(sequences)} of {sequences.dim}"
            )
        steps = list(sequences)
        good = [bool(np.isfinite(one.values).all()) for one in steps]
        fresh = {key: one for key, one, fine in zip(keys, steps, good, strict=True) if fine}
        store = part.store
        if store is not None and fresh:
            self._guarded(lambda: store.write(list(fresh), list(fresh.values())))
        part.known |= fresh
        if not all(good):
            bad = clips[good.index(False)]
            raise ValueError(
                f"{self.function}: stream {name!r} gives NaN or infinity for {good.count(False)} of {len(clips)} clips "
                f"of a group, the first being {bad.name or 'without a name'}; such features are not kept"
            )

    def _guarded(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            assert self.cache is not None
            raise cannot_write(self.cache.folder, error) from error

    def sequences(self, stream: Stream, keys: Sequence[bytes]) -> Sequences:
        if isinstance(stream, DerivedStream):
            return stream.derive(self.sequences(stream.source, keys))
        known = self.parts[stream.fingerprint].known
        return Sequences.of([known[key] for key in keys], stream.dim)


def _origin(stream: Stream) -> Stream:
    """The stream that has to be computed from the clips themselves."""
    return _origin(stream.source) if isinstance(stream, DerivedStream) else stream


def _stamp(clip: ClipItem) -> tuple[int, int] | None:
    """Size and time of a file's last change, None where there is none: a digest stands for what was decoded."""
    if isinstance(clip, (bytes, Clip)):
        return None
    try:
        status = os.stat(clip)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def clip_key(clip: ClipItem) -> bytes:
    """SHA-256 of a clip's content: the file's bytes, or the frames, times and sound of a `Clip`.

    Raises OSError for a file that cannot be read.
    """
    if isinstance(clip, bytes):
        return content_key("clip file", CLIPS_VERSION, hashlib.sha256(clip).digest())
    if isinstance(clip, Clip):
        sound = b"" if clip.sound is None else np.ascontiguousarray(clip.sound).data
        about = repr((clip.frames.shape, clip.sample_rate, clip.sound is None)).encode()
        frames, times = np.ascontiguousarray(clip.frames), np.ascontiguousarray(clip.times)
        return content_key("clip frames", CLIPS_VERSION, about, frames.tobytes(), times.tobytes(), bytes(sound))
    digest = hashlib.sha256()
    with open(clip, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return content_key("clip file", CLIPS_VERSION, digest.digest())
