"""Common spaces: estimators that map image features and text features to where they can be compared.

Each has `fit`, `transform_images`, `transform_texts`, `get_params`, `set_params` and `save`; `load_space`
reads any of them back. NumPy only, in float64, and deterministic; saving needs safetensors.
"""

from .base import Space, load_space
from .cca import CCA
from .conse import ConSE
from .coral import CORAL
from .hubness import HubnessCorrection
from .identity import Identity
from .itq import ITQ, pack_codes, unpack_codes
from .ridge import Ridge

__all__ = [
    "CCA",
    "CORAL",
    "ITQ",
    "ConSE",
    "HubnessCorrection",
    "Identity",
    "Ridge",
    "Space",
    "load_space",
    "pack_codes",
    "unpack_codes",
]
