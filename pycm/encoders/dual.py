"""Models with an image side and a text side in one space: CLIP and SigLIP (transformers), open_clip."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._optional import require
from .base import Features, Modality, loading
from .fingerprint import digest_of, plain_settings
from .module import Batch, TorchEncoder, stack_images

if TYPE_CHECKING:
    import torch


class DualEncoder(ABC):
    """An image encoder and a text encoder that share a space; cosine is its metric.

    Attributes:
        image, text: the two sides, each an `Encoder`. Rows are as the model gives them, not normalised.
        logit_scale, logit_bias: trained calibration, `logits = logit_scale * cosine + logit_bias`. The scale
            is the factor itself (models store its logarithm); the bias is 0 where there is none.
    """

    model: torch.nn.Module
    image: TorchEncoder
    text: TorchEncoder
    logit_scale: float
    logit_bias: float

    def logits(self, cosine: Features) -> Features:
        """Calibrated logits of cosine similarities, same shape, float32.

        CLIP: a softmax over the candidates gives probabilities; SigLIP: a sigmoid of each does.
        """
        logits: npt.NDArray[np.float64] = self.logit_scale * np.asarray(cosine, np.float64) + self.logit_bias
        return logits.astype(np.float32)

    @abstractmethod
    def probabilities(self, cosine: Features) -> Features:
        """Probabilities of the matches under the model's own training loss, same shape, float32."""

    @cached_property
    def _model_digest(self) -> str:
        """Of the whole model, for the fingerprints of both sides: hashed once."""
        return digest_of(self.model)

    def side(self, modality: Modality) -> TorchEncoder:
        """`image` or `text`."""
        return self.image if modality == "image" else self.text


def _softmax(logits: Features) -> Features:
    exp = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    shares: npt.NDArray[np.float64] = exp / exp.sum(axis=-1, keepdims=True)
    return shares.astype(np.float32)


def _sigmoid(logits: Features) -> Features:
    return (0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))).astype(np.float32)


class _Side(TorchEncoder):
    """One side: `prepare` and `forward` are the owner's; `config` is what its preparation depends on."""

    def __init__(
        self,
        owner: DualEncoder,
        modality: Modality,
        name: str,
        prepare: Callable[[list[Any]], Batch],
        forward: Callable[[Any], Any],
        config: Callable[[], Any],
    ) -> None:
        super().__init__(owner.model, name=f"{name} ({modality})", modality=modality)
        self._owner = owner
        self._prepare_with, self._forward_with, self._describe = prepare, forward, config

    def _prepare(self, items: list[Any]) -> Batch:
        return self._prepare_with(items)

    def _forward(self, batch: Any) -> Any:
        return self._forward_with(batch)

    def _config(self) -> Any:
        return {"modality": self.modality, "preprocess": self._describe()}

    def _module_digest(self) -> str:
        return self._owner._model_digest


def pooled(output: Any) -> Any:
    """The embedding in what `get_image_features` and `get_text_features` return.

    Releases of transformers differ: a tensor, or an output object whose `pooler_output` is the embedding.
    """
    embedding = getattr(output, "pooler_output", None)
    return output if embedding is None else embedding


def _number(parameter: Any) -> float:
    return float(parameter.detach() if hasattr(parameter, "detach") else parameter)


def describe_tokenizer(tokenizer: Any) -> Any:
    """What determines a tokenizer's output, without the place that it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        core = dict(sorted(tokenizer.get_vocab().items()))
    else:  # padding and truncation are those of its latest call
        core = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    sides = [getattr(tokenizer, key, None) for key in ("padding_side", "truncation_side", "do_lower_case")]
    return [f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}", core, sides]


class _TransformersDual(DualEncoder):
    _padding: str
    _text_inputs: tuple[str, ...]
    _default: str

    def __init__(
        self,
        model: str | torch.nn.Module,
        processor: Any = None,
        *,
        device: str | torch.device | None = None,
        name: str | None = None,
    ) -> None:
        kind = type(self).__name__
        if isinstance(model, str):
            transformers = require("transformers", "encoders", kind)
            name = name or f"{self._default}:{model}"
            with loading(kind, model):
                processor = processor or transformers.AutoProcessor.from_pretrained(model)
                built: Any = transformers.AutoModel.from_pretrained(model)
        else:
            built = model
        for method in ("get_image_features", "get_text_features"):
            if not hasattr(built, method):
                raise TypeError(f"{kind}: {type(built).__name__} has no {method}()")
        if processor is None:
            raise TypeError(f"{kind}: a built model needs its processor= (image processor and tokenizer)")
        if device is not None:
            built = built.to(device)
        self.model: Any = built
        self.processor = processor
        self.max_length = int(self.model.config.text_config.max_position_embeddings)
        self.logit_scale = math.exp(_number(self.model.logit_scale))
        self.logit_bias = _number(getattr(self.model, "logit_bias", 0.0))
        name = name or f"{self._default}:{type(built).__name__}"
        self.image = _Side(self, "image", name, self._prepare_images, self._image_forward, self._image_config)
        self.text = _Side(self, "text", name, self._prepare_texts, self._text_forward, self._text_config)

    def _prepare_images(self, items: list[Any]) -> Batch:
        return dict(self.processor.image_processor(images=items, return_tensors="pt"))

    def _image_forward(self, batch: Mapping[str, torch.Tensor]) -> Any:
        return pooled(self.model.get_image_features(**batch))

    def _image_config(self) -> Any:
        return plain_settings(self.processor.image_processor.to_dict())

    def _prepare_texts(self, items: list[Any]) -> Batch:
        encoded = self.processor.tokenizer(
            items, padding=self._padding, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {key: encoded[key] for key in self._text_inputs if key in encoded}

    def _text_forward(self, batch: Mapping[str, torch.Tensor]) -> Any:
        return pooled(self.model.get_text_features(**batch))

    def _text_config(self) -> Any:
        return [describe_tokenizer(self.processor.tokenizer), self._padding, self.max_length]


class TransformersCLIP(_TransformersDual):
    """CLIP (Radford et al. 2021) from transformers.

    Args:
        model: a hub name or a folder, or a built `CLIPModel`.
        processor: its `CLIPProcessor` (or an object with `.image_processor` and `.tokenizer`); needed for
            a built model. Texts are padded to the longest of a batch and cut at the model's length (77).
        device: moves the model there; None leaves it.
        name: for people.
    """

    _padding = "longest"
    _text_inputs = ("input_ids", "attention_mask")
    _default = "clip"

    def probabilities(self, cosine: Features) -> Features:
        """Softmax over the last axis of `logits(cosine)`."""
        return _softmax(self.logits(cosine))


class TransformersSigLIP(_TransformersDual):
    """SigLIP (Zhai et al. 2023) and SigLIP 2 from transformers.

    Args as for `TransformersCLIP`. Texts are padded to the model's full length (64) and the padding is
    attended to, as in training: other padding gives other embeddings.
    """

    _padding = "max_length"
    _text_inputs = ("input_ids",)
    _default = "siglip"

    def probabilities(self, cosine: Features) -> Features:
        """Sigmoid of `logits(cosine)`: each pair for itself."""
        return _sigmoid(self.logits(cosine))


class OpenCLIP(DualEncoder):
    """A model of open_clip.

    Args:
        model: "ARCHITECTURE/PRETRAINED-TAG" (e.g. "ViT-B-32/laion2b_s34b_b79k"), "hf-hub:NAME", or a built
            model.
        preprocess: RGB PIL image -> tensor; needed for a built model.
        tokenizer: list of str -> ids [B, context length]; needed for a built model.
        device: moves the model there; None leaves it.
        name: for people.

    A model with a trained bias (SigLIP weights) gives sigmoid probabilities, others softmax.
    """

    def __init__(
        self,
        model: str | torch.nn.Module,
        preprocess: Callable[[Any], torch.Tensor] | None = None,
        tokenizer: Callable[[list[str]], torch.Tensor] | None = None,
        *,
        device: str | torch.device | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(model, str):
            open_clip = require("open_clip", None, "OpenCLIP")
            name = name or f"open_clip:{model}"
            architecture, _, tag = (model, "", "") if model.startswith("hf-hub:") else model.partition("/")
            if not tag and not model.startswith("hf-hub:"):
                raise ValueError(f"OpenCLIP: model must be ARCHITECTURE/PRETRAINED-TAG or hf-hub:NAME, got {model!r}")
            built: Any
            with loading("OpenCLIP", model):
                built, own = open_clip.create_model_from_pretrained(architecture, pretrained=tag or None)
                preprocess = preprocess or own
                tokenizer = tokenizer or open_clip.get_tokenizer(architecture)
        else:
            built = model
        if preprocess is None or tokenizer is None:
            raise TypeError("OpenCLIP: a built model needs preprocess= and tokenizer=")
        if device is not None:
            built = built.to(device)
        self.model: Any = built
        self.preprocess, self.tokenizer = preprocess, tokenizer
        bias = getattr(built, "logit_bias", None)
        self.logit_scale = math.exp(_number(self.model.logit_scale))
        self.logit_bias = 0.0 if bias is None else _number(bias)
        self._sigmoid = bias is not None
        name = name or f"open_clip:{type(built).__name__}"
        self.image = _Side(
            self,
            "image",
            name,
            lambda items: stack_images([self.preprocess(item) for item in items]),
            self.model.encode_image,
            lambda: self.preprocess,
        )
        self.text = _Side(self, "text", name, self.tokenizer, self.model.encode_text, self._text_config)

    def _text_config(self) -> Any:
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is not None and hasattr(inner, "get_vocab"):  # open_clip's HFTokenizer
            rest = {key: value for key, value in vars(self.tokenizer).items() if key != "tokenizer"}
            return [describe_tokenizer(inner), rest]
        if hasattr(self.tokenizer, "bpe_ranks"):  # its SimpleTokenizer, which remembers words in `cache`
            content = {key: value for key, value in vars(self.tokenizer).items() if key != "cache"}
            return [type(self.tokenizer), content]
        return self.tokenizer

    def probabilities(self, cosine: Features) -> Features:
        """Softmax over the last axis, or sigmoid for a model trained with a bias."""
        return (_sigmoid if self._sigmoid else _softmax)(self.logits(cosine))
