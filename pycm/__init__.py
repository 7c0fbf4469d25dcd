"""pycm: cross-modal matching with exact, fast scores.

`similarity`, `topk`, `rank` and the joins of `pycm.mining` score embeddings of NumPy, torch and DLPack arrays; a
`Gallery` keeps them for many searches; `ImageTextMatcher` matches photographs with sentences, `VideoTextMatcher` clips
with sentences. `import pycm` needs NumPy only; what needs more is imported on first use and names the extra to install.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from pycm import _C  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"pycm: no compiled module in {Path(__file__).parent}: this is the source folder; install it with "
        "`pip install .` and import it from elsewhere, or with `pip install -e .`"
    ) from error

from pycm._info import __version__, backend_info
from pycm.functional import (
    DISTANCES,
    METRICS,
    Matches,
    Metric,
    Precision,
    Screen,
    set_num_threads,
    similarity,
    topk,
    workspace_bytes,
)
from pycm.late_interaction import maxsim, maxsim_topk, xattn_score
from pycm.mining import Groups, Pairs, all_pairs_topk, deduplicate, mine_hard_negatives, threshold_join
from pycm.ranking import Ranks, Ties, rank
from pycm.temporal import pool_states, temporal_pool

if TYPE_CHECKING:
    from pycm import (
        audio,
        compat,
        encoders,
        evaluate,
        gallery,
        losses,
        matchers,
        mining,
        nn,
        reference,
        spaces,
        streams,
        temporal,
        text,
        video,
    )
    from pycm.gallery import Gallery, GalleryMatches
    from pycm.matchers import ImageTextMatcher, ImageVideoMatcher, VideoTextMatcher

__all__ = [
    "DISTANCES",
    "METRICS",
    "Gallery",
    "GalleryMatches",
    "Groups",
    "ImageTextMatcher",
    "ImageVideoMatcher",
    "Matches",
    "Metric",
    "Pairs",
    "Precision",
    "Ranks",
    "Screen",
    "Ties",
    "VideoTextMatcher",
    "__version__",
    "all_pairs_topk",
    "audio",
    "backend_info",
    "compat",
    "deduplicate",
    "encoders",
    "evaluate",
    "gallery",
    "losses",
    "matchers",
    "maxsim",
    "maxsim_topk",
    "mine_hard_negatives",
    "mining",
    "nn",
    "pool_states",
    "rank",
    "reference",
    "set_num_threads",
    "similarity",
    "spaces",
    "streams",
    "temporal",
    "temporal_pool",
    "text",
    "threshold_join",
    "topk",
    "video",
    "workspace_bytes",
    "xattn_score",
]

_MODULES = {
    *("audio", "compat", "encoders", "evaluate", "gallery", "losses", "matchers", "mining", "nn", "reference"),
    *("spaces", "streams", "text", "video"),
}
_NAMES = {
    "Gallery": "gallery",
    "GalleryMatches": "gallery",
    "ImageTextMatcher": "matchers",
    "ImageVideoMatcher": "matchers",
    "VideoTextMatcher": "matchers",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pycm.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"pycm.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'pycm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
