"""Encoders that are trained with a matcher's network: their inputs, read ahead of use, and their gradients."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._decode import available_cpus
from ..encoders.fingerprint import digest_of
from ..encoders.images import UnreadableInputError, load_image, load_images
from ..encoders.module import TorchEncoder
from ..streams import Appearance, FeatureDifferences
from .inputs import Features, Inputs, Live, Rows, Steps, Streams, lives

if TYPE_CHECKING:
    from typing_extensions import Self

#: Names of `matcher.encoders` whose encoders a fit trains, "all" of them that can be trained, or None.
FineTune: TypeAlias = str | Sequence[str] | None

_AHEAD = 16  # items read ahead within a batch
_AHEAD_BYTES = 256 << 20  # of the next batch


class Source:
    """The items of one side as one encoder's inputs: a clip's frames, a text, the boxes of an image.

    Args:
        encoder: as it was given: its copy is what is trained.
        method: of the encoder: "encode", "encode_grid" or "encode_tokens".
        read: (number of an item) -> its inputs, images or texts; called from several threads.
        key: (number of an item) -> bytes that tell its content.
        count: of items.
    """

    def __init__(
        self, tuning: Tuning, encoder: TorchEncoder, method: str, read: Callable[[int], list[Any]],
        key: Callable[[int], bytes], count: int,
    ) -> None:  # fmt: skip
        self.encoder, self.method = encoder, method
        self._tuning, self._read, self._key, self._count = tuning, read, key, count
        tuning.encoders[id(encoder)] = encoder
        self._kept: dict[int, list[Any]] = {}
        self._coming: dict[int, Future[list[Any]]] = {}
        self._largest = 0  # bytes of an item that was read
        self._joined: dict[Source, Source] = {}

    def joined(self, other: Source) -> Source:
        """The items of both, those of `other` numbered after these; one object for all streams of the encoder."""

        def either(mine: Callable[[int], Any], theirs: Callable[[int], Any]) -> Callable[[int], Any]:
            return lambda i: mine(i) if i < self._count else theirs(i - self._count)

        read, key = either(self._read, other._read), either(self._key, other._key)
        both = Source(self._tuning, self.encoder, self.method, read, key, self._count + other._count)
        return self._joined.setdefault(other, both)

    def ahead(self, ids: Sequence[int]) -> None:
        """Begin to read what is not at hand, as many items as fit into `_AHEAD_BYTES`, and `_AHEAD` at least."""
        for i in ids[: max(_AHEAD, _AHEAD_BYTES // self._largest if self._largest else 0)]:
            if i not in self._kept and i not in self._coming:
                self._coming[i] = self._tuning.pool.submit(self._read, i)

    def inputs(self, ids: Sequence[int]) -> Iterator[list[Any]]:
        """Each item's inputs, in order; the next ones are read meanwhile."""
        for at, i in enumerate(ids):
            self.ahead(ids[at : at + _AHEAD])
            found = self._kept.get(i) or self._coming.pop(i).result()
            if i not in self._kept:
                size = sum(getattr(one, "nbytes", 0) for one in found)
                self._largest = max(self._largest, size)
                if size <= self._tuning.room:
                    self._tuning.room -= size
                    self._kept[i] = found
            yield found

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the encoder, what is trained of it, and all items' content."""
        trained = [name for name, weight in self.encoder.module.named_parameters() if weight.requires_grad]
        stream = hashlib.sha256(repr((self.encoder.fingerprint, self.method, trained)).encode())
        for i in range(self._count):
            stream.update(hashlib.sha256(self._key(i)).digest())
        return stream.digest()


class Tuning:
    """What a fit trains beside its network.

    Args:
        names: of `matcher.encoders`.
        kept_bytes: how much decoded input is held in memory from epoch to epoch; what is beyond it is read again. What
            is read ahead comes on top: 16 items, and of the next batch 256 MiB, or 16 items where these are more.
        workers: threads that read; None is the number of processors, at most 8.
        batch_size: inputs per forward pass of an encoder.
    """

    def __init__(self, names: frozenset[str], kept_bytes: int, workers: int | None, batch_size: int) -> None:
        self.names, self.room, self.batch_size = names, kept_bytes, batch_size
        self.encoders: dict[int, TorchEncoder] = {}  # those that are trained, as they were given, by id
        self.pool = ThreadPoolExecutor(
            max(1, min(8, available_cpus()) if workers is None else workers), thread_name_prefix="pycm-read"
        )

    def __enter__(self) -> Self:
        cudnn = torch.backends.cudnn  # whose fastest algorithms do not add in one order
        self._cudnn = cudnn.benchmark, cudnn.deterministic
        cudnn.benchmark, cudnn.deterministic = False, True
        return self

    def __exit__(self, *error: object) -> None:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = self._cudnn
        self.pool.shutdown(cancel_futures=True)


@contextmanager
def tuning(matcher: Any, names: frozenset[str], kept_bytes: int, workers: int | None) -> Iterator[None]:
    """While entered, the matcher's `_tuning` is of these names; of no name it is None."""
    if not names:
        yield
        return
    with Tuning(names, kept_bytes, workers, matcher.batch_size) as matcher._tuning:
        try:
            yield
        finally:
            matcher._tuning = None


class FineTuned(nn.Module):
    """A network with copies of the encoders that are trained with it.

    Batch norms keep their running statistics: a batch of video frames is no sample of the images that they stand for
    (and their scale and shift are trained). Where a batch takes more than one pass of an encoder, what is inside the
    passes is computed once more in the backward pass, so that memory is that of one pass.

    Attributes:
        tuned: the copies, by the ids of the encoders as they were given. Two that share a module share its copy.
        encoders: their modules.
    """

    def __init__(self, network: nn.Module, tuning: Tuning) -> None:
        super().__init__()
        given = self.given = list(tuning.encoders.values())
        self.network, self.batch_size, self.pool = network, tuning.batch_size, tuning.pool
        self.tuned = dict(zip(map(id, given), copies(given), strict=True))
        modules = {id(encoder.module): encoder.module for encoder in self.tuned.values()}
        self.encoders = nn.ModuleList(modules.values())
        self._traced: set[int] = set()  # encoders whose graph was looked at

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of all but batch norms."""
        super().train(mode)
        for module in self.encoders.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def finished(self) -> dict[int, TorchEncoder]:
        """The trained encoders, by the ids of those given, with their fingerprints."""
        for encoder in self.given:
            stamp(self.tuned[id(encoder)], encoder)
        return self.tuned

    def forward(self, *arguments: Any) -> Any:
        """The network's, of encoded inputs."""
        return self.network(*(self.encoded(one) for one in arguments))

    def encoded(self, inputs: Any) -> Any:
        """`Inputs` or features whose live parts the encoders have turned into values; anything else as it is."""
        if isinstance(inputs, Inputs):
            return Inputs(self.encoded(inputs.features), inputs.start)
        if not isinstance(inputs, (Live, Streams)):
            return inputs
        done: dict[int, tuple[Tensor, Tensor]] = {}  # streams of one encoder share its pass

        def of(live: Live) -> Rows | Steps:
            if id(live.source) not in done:
                done[id(live.source)] = self._rows(live)
            return live.finish(*done[id(live.source)], live.ids)

        return _replaced(inputs, of)

    def _rows(self, live: Live) -> tuple[Tensor, Tensor]:
        """(rows [S, dim], int64 [N] how many each item has)."""
        source, device = live.source, live.ids.device
        encoder = self.tuned[id(source.encoder)]
        sizes: list[int] = []

        def batches() -> Iterator[list[Any]]:
            waiting: list[Any] = []
            for inputs in source.inputs(live.ids.tolist()):
                sizes.append(len(inputs))
                waiting += inputs
                while len(waiting) >= self.batch_size:
                    yield waiting[: self.batch_size]
                    waiting = waiting[self.batch_size :]
            if waiting:
                yield waiting

        rows: list[Tensor] = []
        counts: list[Tensor] = []
        prepared = _one_ahead(self.pool, lambda batch: _prepare(encoder, batch), batches())
        for batch, last in prepared:
            one = source.method, encoder._to_device(batch)
            if (last and not rows) or not torch.is_grad_enabled():
                values, lengths = encoder._steps(*one)
            else:
                values, lengths = checkpoint(encoder._steps, *one, use_reentrant=False)
            if torch.is_grad_enabled() and id(encoder) not in self._traced:
                self._traced.add(id(encoder))
                _check_graph(encoder, values)
            rows.append(values.float().to(device))
            counts.append(lengths.to(device))
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
        total = torch.zeros(len(sizes), dtype=torch.int64, device=device).index_add_(0, owner, torch.cat(counts))
        return torch.cat(rows), total


def _check_graph(encoder: TorchEncoder, values: Tensor) -> None:
    """Raise TypeError where weights beside the encoder's module would get gradients: nobody trains them."""
    own = {id(weight) for weight in encoder.module.parameters()}
    waiting, seen = [values.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        weight = getattr(node, "variable", None)
        if weight is not None and id(weight) not in own:
            raise TypeError(
                f"fit: fine_tune: {encoder.name!r} uses weights {list(weight.shape)} that are not its module's "
                "(in postprocess?): put them into the module, or set their requires_grad to False"
            )
        waiting += [following for following, _ in node.next_functions]


def _prepare(encoder: TorchEncoder, items: list[Any]) -> Any:
    if encoder.modality == "image":
        items, _, errors = load_images("fit", items)
        if errors:
            raise UnreadableInputError(errors, len(items) + len(errors))
    return encoder._prepare(items)


def _one_ahead(pool: Any, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """(function of each item, whether it is the last), the next one computed by the pool meanwhile."""
    coming: Future[Any] | None = None
    for item in items:
        ready = None if coming is None else coming.result()  # never two at once: the function is the user's
        following = pool.submit(function, item)
        if coming is not None:
            yield ready, False
        coming = following
    if coming is not None:
        yield coming.result(), True


def _replaced(features: Features, of: Callable[[Live], Rows | Steps]) -> Any:
    if isinstance(features, Streams):
        parts: dict[str, Any] = {n: of(part) if isinstance(part, Live) else part for n, part in features.parts.items()}
        return Streams(parts)
    return of(features) if isinstance(features, Live) else features


def before(inputs: Any) -> Any:
    """`Inputs` or features with live parts as the encoders made them before any training."""
    if isinstance(inputs, Inputs):
        return Inputs(before(inputs.features), inputs.start)
    return _replaced(inputs, lambda live: live.before.take(live.ids))


def read_ahead(*inputs: Any) -> None:
    """Begin to read what the live parts of these inputs need."""
    for one in inputs:
        for live in lives(one.features if isinstance(one, Inputs) else one):
            live.source.ahead(live.ids.tolist())


def copies(encoders: Sequence[TorchEncoder]) -> list[TorchEncoder]:
    """Copies with weights of their own; what the encoders share, the copies share."""
    return copy.deepcopy(list(encoders))


def stamp(tuned: TorchEncoder, given: TorchEncoder) -> None:
    """The fingerprint of a trained copy: of the encoder that it began as, and its weights."""
    tuned.fingerprint = digest_of("fine-tuned", given.fingerprint, tuned.module.state_dict())


def as_rows(values: Tensor, counts: Tensor, ids: Tensor) -> Rows:
    """One row an item."""
    return Rows(values)


def as_steps(values: Tensor, counts: Tensor, ids: Tensor) -> Steps:
    """Sequences that are all there."""
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Steps(values, ends, torch.ones(len(counts), dtype=torch.bool, device=values.device))


def as_differences(values: Tensor, counts: Tensor, ids: Tensor) -> Steps:
    """As `FeatureDifferences.derive`."""
    steps = as_steps(values, counts, ids)
    first = torch.zeros(len(values), 1, dtype=torch.bool, device=values.device)
    first[steps.cu_seqlens[:-1]] = True
    changes = values - torch.cat([values[:1], values[:-1]])
    return Steps(changes.masked_fill(first, 0.0), steps.cu_seqlens, steps.present)


def pixels(image: Any) -> npt.NDArray[np.uint8]:
    """An image item, read: uint8 [H, W, 3]."""
    return np.asarray(load_image(image))


def encoder_of(part: Any) -> Any:
    """The encoder of a stream, or the encoder itself; None for a stream that has none."""
    if isinstance(part, Appearance):
        return part.encoder
    if isinstance(part, FeatureDifferences):
        return part.source.encoder
    return part if hasattr(part, "encode") else None


def with_encoder(stream: Any, tuned: Mapping[int, TorchEncoder]) -> Any:
    """The stream, of the trained copy of its encoder where there is one."""
    encoder = tuned.get(id(encoder_of(stream)))
    if encoder is None:
        return stream
    changed = copy.copy(stream)
    if isinstance(stream, FeatureDifferences):
        changed.source = with_encoder(stream.source, tuned)
    else:
        changed.encoder = encoder
    return changed


def check_pass(function: str, encoder: Any, method: str) -> None:
    """Raise TypeError for an encoder whose `method` has no pass with gradients."""
    if type(encoder)._steps is TorchEncoder._steps:
        raise TypeError(f"{function}: fine_tune: {type(encoder).__name__}.{method} has no gradients")


def names_of(fine_tune: FineTune) -> list[str]:
    """What it names; [] for None. Raises TypeError for anything but names."""
    names = [fine_tune] if isinstance(fine_tune, str) else fine_tune or []
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"fit: fine_tune must be a name, a sequence of names or None, got {fine_tune!r}")
    return list(names)


def chosen(function: str, fine_tune: FineTune, known: Sequence[str], parts: Mapping[str, Any]) -> frozenset[str]:
    """The names among `parts` (streams and encoders) whose encoders are trained: those of `fine_tune`, and those that
    have an encoder in common with them.

    Raises:
        ValueError: an unknown name, one that two have; "all" where nothing can be trained.
        TypeError: a stream without an encoder, an encoder that is no torch module, one without weights to train in
            float32.
    """
    names = names_of(fine_tune)
    twice = next((name for name in known if known.count(name) > 1), None)
    if names and twice is not None:
        raise ValueError(f"{function}: fine_tune needs different names, but {twice!r} is a stream's and an encoder's")
    reasons = {name: _untrainable(part) for name, part in parts.items()}
    can = [name for name, reason in reasons.items() if reason is None]
    if fine_tune == "all":
        names = can
        if not can:
            raise ValueError(
                f"{function}: fine_tune='all': nothing can be trained: {'; '.join(map(str, reasons.values()))}"
            )
    for name in names:
        if name not in known:
            raise ValueError(f"{function}: fine_tune must be 'all' or of {', '.join(known)}, got {name!r}")
        if reasons[name] is not None:
            here = f" here: {', '.join(can)}" if can else ": any torch module, as a pycm.encoders.ModuleEncoder"
            raise TypeError(f"{function}: fine_tune={name!r}: {reasons[name]}; trainable{here}")
    trained = {id(encoder_of(parts[name])) for name in names}
    return frozenset(name for name in can if id(encoder_of(parts[name])) in trained)


def _untrainable(part: Any) -> str | None:
    """Why its encoder cannot be trained."""
    encoder = encoder_of(part)
    if encoder is None:
        return f"the stream {part.name!r} has no encoder"
    if not isinstance(encoder, TorchEncoder):
        return f"{encoder.name!r}, a {type(encoder).__name__}, is no torch module"
    if not all(isinstance(state, Tensor) for state in encoder.module.state_dict().values()):
        return f"the module of {encoder.name!r} has a state beside its tensors (get_extra_state)"
    if not any(p.requires_grad for p in encoder.module.parameters()):
        return f"the module of {encoder.name!r} has no parameter with requires_grad"
    other = next((p.dtype for p in encoder.module.parameters() if p.requires_grad and p.dtype != torch.float32), None)
    return None if other is None else f"the module of {encoder.name!r} has weights of {other}, to be made float32"
