"""``clip_benchmark/metrics/zeroshot_retrieval.py`` of CLIP_benchmark: Cherti and Beaumont, 2022. `evaluate` retrieves
without the matrix of scores; `recall_at_k` without the ``[N, k, M]`` one-hot array.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pycm._optional import require
from pycm.functional import topk

if TYPE_CHECKING:
    import torch


def recall_at_k(scores: torch.Tensor, positive_pairs: torch.Tensor, k: int) -> torch.Tensor:
    """The share of each text's positives that are among its k best images.

    Args:
        scores: ``[N, M]``, texts by images.
        positive_pairs: booleans ``[N, M]``.
        k: from 1 to M.

    Returns:
        ``[N]`` float32; NaN for a text without positives. Ties are broken by ``torch.topk``, as in the original.

    O(N·k) memory.
    """
    torch = require("torch", "torch", "recall_at_k")
    best = torch.topk(scores, k, dim=1).indices
    found = positive_pairs.gather(1, best).sum(dim=1)
    return found / positive_pairs.sum(dim=1)


def evaluate(
    model: Any,
    dataloader: Iterable[tuple[Any, Any]],
    tokenizer: Any,
    device: Any,
    amp: bool = True,
    recall_k_list: Sequence[int] = (5,),
) -> dict[str, float]:
    """Zero-shot retrieval of a CLIP-like model, both directions.

    Args:
        model: has ``encode_image`` and ``encode_text``.
        dataloader: gives batches ``(images [B, ...], texts)``; texts is a sequence of B sequences of captions.
        tokenizer: makes a tensor from a list of captions.
        device: where the model is.
        amp: encode under CUDA's automatic mixed precision, when device is a CUDA one.
        recall_k_list: the k of the recalls; none above the number of images or of captions.

    Returns:
        For each k the fractions "image_retrieval_recall@k" of captions whose image, and "text_retrieval_recall@k" of
        images one of whose captions, is among the k best; of equal scores the smaller index comes first.

    Raises:
        ValueError: a k is out of range.

    Scores are exact dot products of the normalised embeddings. O(N·M·D) time, O((N + M)·(D + k)) memory.
    """
    torch = require("torch", "torch", "evaluate")
    tqdm = require("tqdm", "encoders", "evaluate").tqdm
    on_cuda = torch.device(device).type == "cuda"
    image_parts, text_parts, image_of_text = [], [], []
    images_seen = 0
    for batch_images, batch_texts in tqdm(dataloader, disable=None):
        tokens = tokenizer([text for texts in batch_texts for text in texts]).to(device)
        with torch.no_grad(), torch.autocast("cuda", enabled=amp and on_cuda):
            image_parts.append(_unit(model.encode_image(batch_images.to(device))))
            text_parts.append(_unit(model.encode_text(tokens)))
        image_of_text += [images_seen + row for row, texts in enumerate(batch_texts) for _ in texts]
        images_seen += len(batch_images)
    images, texts = torch.cat(image_parts), torch.cat(text_parts)
    owner = torch.tensor(image_of_text)

    k_max = max(recall_k_list)
    found_images = topk(texts, images, k_max, "dot").indices == owner[:, None]
    found_texts = owner[topk(images, texts, k_max, "dot").indices] == torch.arange(len(images))[:, None]
    metrics = {}
    for k in recall_k_list:
        metrics[f"image_retrieval_recall@{k}"] = found_images[:, :k].any(1).float().mean().item()
        metrics[f"text_retrieval_recall@{k}"] = found_texts[:, :k].any(1).float().mean().item()
    return metrics


def _unit(embeddings: torch.Tensor) -> torch.Tensor:
    torch = require("torch", "torch", "evaluate")
    return torch.nn.functional.normalize(embeddings, dim=-1).cpu()  # type: ignore[no-any-return]
