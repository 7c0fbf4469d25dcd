"""The sides of a trained matcher: how items of one kind become network inputs, and what is saved of that."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .._rows import normalize_rows
from ..encoders import Encoder, get_encoder
from ..encoders.base import Modality, check_items, check_texts
from ..encoders.cache import image_key, text_key
from ..encoders.descriptor import TextDescriptor
from ..encoders.images import UnreadableInputError
from ..streams import ClipFeatures, FeatureDifferences, encode_clips, get_streams
from ..streams.encode import clip_key
from ..video import read_clip
from .encoded import Encoded, Options
from .features import OnError, encode_named
from .inputs import Features, Live, Rows, Steps, Streams, width
from .tuning import as_differences, as_rows, as_steps, encoder_of, pixels, with_encoder

WORDS = "words"
CLIP_SIZE = 256  # of the shorter side, in pixels
_TOKEN = re.compile(r"\w+")


class ClipSide:
    """Clips as the streams of their features."""

    kind = "clip"

    def __init__(self, function: str, streams: Sequence[Any], sampling: Any, start: Sequence[str] | None) -> None:
        if isinstance(streams, str) or not len(streams):
            raise ValueError(f"{function}: streams must be a sequence of at least one stream, got {streams!r}")
        self.given = tuple(streams)
        self.names = tuple(s if isinstance(s, str) else str(s.name) for s in self.given)  # a spec is its stream's name
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise ValueError(f"{function}: streams must have different names, {twice[0]!r} comes twice")
        self.start = self.names[:1] if start is None else tuple(start)
        unknown = [name for name in self.start if name not in self.names]
        if unknown or not self.start:
            raise ValueError(f"{function}: space_streams must be among {', '.join(self.names)}, got {start!r}")
        self.sampling = sampling
        self._made: tuple[Any, ...] | None = None
        self._tuned: tuple[Any, ...] | None = None
        self._expected: tuple[Mapping[str, str | None], str] = {}, ""

    def expect(self, fingerprints: Mapping[str, str | None], message: str) -> None:
        """Refuse streams of other fingerprints, with `message`; those of specs when they are made."""
        self._expected = fingerprints, message
        self._check([stream for stream in self.given if not isinstance(stream, str)])

    def _check(self, streams: Sequence[Any]) -> None:
        expected, message = self._expected
        for stream in streams:
            if expected.get(stream.name) not in (None, stream.fingerprint):
                raise ValueError(message.format(f"stream {stream.name!r}"))

    def made(self, device: torch.device) -> tuple[Any, ...]:
        """The streams; those given as specs are made when first needed."""
        if self._made is None:
            made = tuple(get_streams(self.given, device=device))
            self._check(made)
            self._made = made
        return self._tuned or self._made

    def parts(self, device: torch.device, asked: Sequence[str] | None) -> dict[str, Any]:
        """The streams by name; where none of `asked` is here, those alone that were given as objects."""
        if asked is None or any(name in self.names for name in asked):
            return dict(zip(self.names, self.made(device), strict=True))
        return {stream.name: stream for stream in self.given if not isinstance(stream, str)}

    def made_parts(self, *, tuned: bool) -> dict[str, Any]:
        """The streams that were made; of encoders as they were given, or of trained copies where there are any."""
        return dict(zip(self.names, (tuned and self._tuned) or self._made or (), strict=False))

    def use(self, tuned: Mapping[int, Any]) -> None:
        """Put trained copies in the place of encoders, by the ids of these; {} puts them back."""
        self._tuned = tuple(with_encoder(s, tuned) for s in self._made) if tuned and self._made else None

    def describe(self) -> list[dict[str, Any]]:
        """Name, spec and fingerprint of each stream; no fingerprint where it was never made."""
        made = self._made or (None,) * len(self.given)
        return [
            {
                "name": name,
                "spec": given if isinstance(given, str) else None,
                "fingerprint": None if stream is None else stream.fingerprint,
            }
            for name, given, stream in zip(self.names, self.given, made, strict=True)
        ]

    def encode(self, function: str, clips: Any, options: Options, on_error: OnError = "raise") -> Encoded:
        """Raises ValueError for no clips, a ClipFeatures without one of the streams, NaN (the clip is named)."""
        if not isinstance(clips, ClipFeatures):
            check_items(function, clips)
        if not len(clips):
            raise ValueError(f"{function}: clips is empty")
        if isinstance(clips, ClipFeatures):
            found = clips
            missing = [name for name in self.names if name not in found.streams]
            if missing:
                raise ValueError(f"{function}: clips has no stream {missing[0]!r}, it has: {', '.join(found.streams)}")
            for stream in self._tuned or ():
                if found.fingerprints.get(stream.name) not in (None, stream.fingerprint):
                    raise ValueError(
                        f"{function}: clips has {stream.name!r} features of another encoder than the fine-tuned one; "
                        "encode them with the streams of the matcher's `encoders`"
                    )
        else:
            found = encode_clips(
                self.made(options.device), clips, sampling=self.sampling, cache=options.cache, workers=options.workers,
                size=CLIP_SIZE, batch_size=options.batch_size, progress=options.progress, on_error=on_error,
            )  # fmt: skip
        parts: dict[str, Steps | Live] = {}
        for name in self.names:
            given = found.streams[name]
            values = np.ascontiguousarray(given.values, np.float32)
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                step = int(np.argmin(finite))
                clip = found.names[int(np.searchsorted(given.cu_seqlens, step, side="right")) - 1]
                raise ValueError(f"{function}: the {name!r} features of clip {clip!r} hold NaN or infinity")
            parts[name] = Steps(
                torch.from_numpy(values).to(options.device),
                torch.from_numpy(np.array(given.cu_seqlens, np.int64)).to(options.device),
                torch.from_numpy(np.array(given.present, bool)).to(options.device),
            )
        # A ClipFeatures is what it is: its rows are the clips given.
        parts |= self._live(function, clips, found, parts, options)
        kept = np.arange(len(found), dtype=np.int64) if found is clips else np.asarray(found.kept, np.int64)
        errors = [] if found is clips else list(found.errors)
        return Encoded(
            Streams(parts), list(found.names), kept, errors, dict(found.seconds) if found is not clips else {}
        )

    def _live(
        self, function: str, clips: Any, found: ClipFeatures, parts: Mapping[str, Any], options: Options
    ) -> dict[str, Live]:
        """The streams of encoders that are trained."""
        names = [name for name in self.names if options.trains(name)]
        if not names:
            return {}
        if found is clips:
            raise ValueError(f"{function}: fine_tune={names[0]!r} needs the clips themselves, got a ClipFeatures")
        items = [clips[i] for i in found.kept]

        def read(i: int) -> list[Any]:
            return list(read_clip(items[i], self.sampling, size=CLIP_SIZE).frames)

        made = dict(zip(self.names, self.made(options.device), strict=True))
        lives: dict[str, Live] = {}
        source: dict[int, Live] = {}
        for name in names:
            encoder = encoder_of(made[name])
            finish = as_differences if isinstance(made[name], FeatureDifferences) else as_steps
            if id(encoder) in source:  # one decoding, and one pass of the encoder, for all of its streams
                lives[name] = replace(source[id(encoder)], before=parts[name], finish=finish)
            else:
                lives[name] = source[id(encoder)] = options.live(
                    encoder, "encode", read, lambda i: clip_key(items[i]), parts[name], finish
                )
        return lives

    def start_rows(self, features: Features) -> npt.NDArray[np.float64]:
        """What the linear start reads: the mean step of each of `start`; several at unit length, side by side."""
        assert isinstance(features, Streams)
        means = [features.steps(name).means().cpu().numpy() for name in self.start]
        return means[0] if len(means) == 1 else np.concatenate([normalize_rows(m, "l2") for m in means], 1)

    def tower(self, features: Features) -> dict[str, Any]:
        """Kind and sizes of the tower that reads these features, as plain values."""
        assert isinstance(features, Streams)
        return {"kind": "sequence", "dims": {name: width(features.parts[name]) for name in self.names}}


class RowSide:
    """Images or texts as one row each."""

    def __init__(self, function: str, modality: Modality, given: Encoder | str) -> None:
        self.kind = modality
        self.names = (modality,)
        self.spec = given if isinstance(given, str) else None
        self._encoder = None if isinstance(given, str) else given
        self._tuned: Encoder | None = None
        self._function, self._fits = function, True
        if self._encoder is not None:
            # Not isinstance(encoder, Encoder): it would compute the dimension and the fingerprint.
            if not callable(getattr(given, "encode", None)) or not hasattr(given, "modality"):
                raise TypeError(
                    f"{function}: {modality}_encoder must be an encoder or the spec of one, got {type(given).__name__}"
                )
            if self._encoder.modality != modality:
                raise ValueError(
                    f"{function}: {modality}_encoder must encode {modality}s, but {self._encoder.name!r} encodes "
                    f"{self._encoder.modality}s"
                )
            # One that was fitted before it came here is not this matcher's to fit.
            self._fits = not getattr(given, "fitted", True)

    def encoder(self, device: torch.device) -> Encoder:
        """The encoder, or its trained copy; one given as a spec is made when first needed."""
        return self._tuned or self.given_encoder(device)

    def given_encoder(self, device: torch.device) -> Encoder:
        """The encoder as it was before any training."""
        if self._encoder is None:
            assert self.spec is not None
            self._encoder = get_encoder(self.spec, self.kind, device=device)
        return self._encoder

    def parts(self, device: torch.device, asked: Sequence[str] | None) -> dict[str, Any]:
        """The encoder by its name, where it is asked for or was given as an object."""
        return {self.kind: self.encoder(device)} if asked is None or self.kind in asked or self._encoder else {}

    def made_parts(self, *, tuned: bool) -> dict[str, Any]:
        """As `ClipSide.made_parts`."""
        return {} if self._encoder is None else {self.kind: (tuned and self._tuned) or self._encoder}

    def use(self, tuned: Mapping[int, Any]) -> None:
        """As `ClipSide.use`."""
        self._tuned = tuned.get(id(self._encoder))

    def fit(self, texts: Sequence[str], options: Options) -> None:
        """Fit a text descriptor that has to be (TF-IDF, bag of words)."""
        encoder = self.encoder(options.device)
        if isinstance(encoder, TextDescriptor) and self._fits:
            encoder.fit(texts)

    def encode(self, function: str, items: Sequence[Any], options: Options, on_error: OnError = "raise") -> Encoded:
        """Raises ValueError for no items, NaN; TypeError for a lone item; UnreadableInputError."""
        result, names = encode_named(
            function, self.encoder(options.device), items, cache=options.cache, batch_size=options.batch_size,
            progress=options.progress, on_error=on_error,
        )  # fmt: skip
        rows = Rows(torch.from_numpy(np.ascontiguousarray(result.features, np.float32)).to(options.device))
        features: Features = rows
        if self.kind == "text" and options.trains("text"):
            features = options.live(
                self._encoder, "encode", lambda i: [items[i]], lambda i: text_key(items[i]), rows,
                as_rows,
            )  # fmt: skip
        return Encoded(features, names, result.kept, result.errors, {})

    def start_rows(self, features: Features) -> npt.NDArray[np.float64]:
        """What the linear start reads: the rows."""
        assert isinstance(features, Rows)
        return features.values.double().cpu().numpy()

    def tower(self, features: Features) -> dict[str, Any]:
        """Kind and sizes of the tower that reads these features, as plain values."""
        assert isinstance(features, (Rows, Live))
        return {"kind": "rows", "inputs": width(features)}


class ImageSide(RowSide):
    """Images as sequences for an LSTM: an item is one image, or several of the same thing in their order."""

    def __init__(self, function: str, given: Encoder | str) -> None:
        super().__init__(function, "image", given)

    def encode(self, function: str, items: Sequence[Any], options: Options, on_error: OnError = "raise") -> Encoded:
        """As `RowSide.encode`; an item is left out with any of its images."""
        check_items(function, items)
        groups = [list(item) if isinstance(item, (list, tuple)) else [item] for item in items]
        empty = next((i for i, group in enumerate(groups) if not group), None)
        if empty is not None:
            raise ValueError(f"{function}: images[{empty}] is an empty list")
        flat = super().encode(function, [image for group in groups for image in group], options, on_error)
        lengths = np.array([len(group) for group in groups])
        owner = np.repeat(np.arange(len(groups)), lengths)
        kept = np.flatnonzero(np.bincount(owner[flat.kept], minlength=len(groups)) == lengths)
        if not len(kept):
            raise UnreadableInputError(flat.errors, len(items))
        assert isinstance(flat.features, Rows)
        used = np.isin(owner[flat.kept], kept)
        values = flat.features.values[torch.from_numpy(np.flatnonzero(used)).to(options.device)]
        ends = torch.from_numpy(np.cumsum([0, *lengths[kept]])).to(options.device)
        steps = Steps(values, ends, torch.ones(len(kept), dtype=torch.bool, device=options.device))
        first = dict(zip(owner[flat.kept][::-1], flat.names[::-1], strict=True))  # an item's name is its first image's
        part: Steps | Live = steps
        if options.trains("image"):
            part = options.live(
                self._encoder, "encode", lambda i: [pixels(image) for image in groups[kept[i]]],
                lambda i: b"".join(image_key(function, image, 0) for image in groups[kept[i]]), steps, as_steps,
            )  # fmt: skip
        return Encoded(Streams({"image": part}), [first[i] for i in kept], kept, flat.errors, {})

    def start_rows(self, features: Features) -> npt.NDArray[np.float64]:
        """What the linear start reads: the mean of an item's rows."""
        assert isinstance(features, Streams)
        return features.steps("image").means().cpu().numpy()

    def tower(self, features: Features) -> dict[str, Any]:
        """Kind and sizes of the tower that reads these features, as plain values."""
        assert isinstance(features, Streams)
        dims = {"image": width(features.parts["image"])}
        return {"kind": "sequence", "dims": dims, "cell": "lstm", "pool": "last", "bidirectional": False}


class WordSide:
    """Texts as sequences of words: lower case, those of the training texts; 0 stands for any other."""

    kind: Modality = "text"
    names: tuple[str, ...] = ()  # its word vectors are the network's

    def __init__(self) -> None:
        self.vocabulary: list[str] = []
        self._ids: dict[str, int] = {}

    def parts(self, device: torch.device, asked: Sequence[str] | None) -> dict[str, Any]:
        """No encoder."""
        return {}

    def made_parts(self, *, tuned: bool) -> dict[str, Any]:
        """No encoder."""
        return {}

    def use(self, tuned: Mapping[int, Any]) -> None:
        """Nothing to replace."""

    def set_vocabulary(self, words: Sequence[str]) -> None:
        self.vocabulary = list(words)
        self._ids = {word: i for i, word in enumerate(self.vocabulary, start=1)}

    def fit(self, texts: Sequence[str], options: Options) -> None:
        """Learn the vocabulary."""
        words = sorted({word for text in texts for word in _TOKEN.findall(text.lower())})
        if not words:
            raise ValueError(f"words: none of the {len(texts)} training texts has a word")
        self.set_vocabulary(words)

    def encode(self, function: str, items: Sequence[Any], options: Options, on_error: OnError = "raise") -> Encoded:
        """A text without a word counts as one unknown word."""
        check_texts(function, items)
        if not len(items):
            raise ValueError(f"{function}: texts is empty")
        ids = [[self._ids.get(word, 0) for word in _TOKEN.findall(text.lower())] or [0] for text in items]
        lengths = torch.tensor([0, *map(len, ids)])
        values = torch.tensor([i for row in ids for i in row])
        steps = Steps(values, lengths.cumsum(0), torch.ones(len(items), dtype=torch.bool))
        moved = Steps(*(x.to(options.device) for x in (steps.values, steps.cu_seqlens, steps.present)))
        return Encoded(moved, list(items), np.arange(len(items), dtype=np.int64), [], {})

    def start_rows(self, features: Features) -> npt.NDArray[np.float64]:
        raise ValueError('a linear start needs rows of both sides: space must be None with text_encoder="words"')

    def tower(self, features: Features) -> dict[str, Any]:
        """Kind and sizes of the tower that reads these features, as plain values."""
        return {"kind": "words", "words": len(self.vocabulary) + 1}
