"""The feature cache; see `pycm.encoders.cache`."""

from .encoders.cache import EncodeResult, FeatureCache

__all__ = ["EncodeResult", "FeatureCache"]
