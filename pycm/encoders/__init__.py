"""Encoders: images and texts to feature rows, and the cache that keeps them.

Importing this package imports NumPy only; torch, Pillow, transformers and the rest are imported by the
encoder that needs them, when it is made.
"""

from .backbones import TimmBackbone, TorchvisionBackbone
from .base import ClassifierEncoder, Encoder, ImageItem, Modality
from .cache import EncodeResult, FeatureCache
from .color import ColorHistogram
from .concat import ConcatEncoder
from .dual import DualEncoder, OpenCLIP, TransformersCLIP, TransformersSigLIP
from .efficientnet import EfficientNetLite0, imagenet_classes
from .images import ImageReadError, UnreadableInputError, load_image
from .layers import LayersEncoder
from .module import ModuleEncoder, TorchEncoder
from .preprocess import ImagePreprocess
from .registry import get_encoder, get_encoders, known_encoders
from .sentence import MiniLM, SentenceTransformerEncoder

__all__ = [
    "ClassifierEncoder",
    "ColorHistogram",
    "ConcatEncoder",
    "DualEncoder",
    "EfficientNetLite0",
    "EncodeResult",
    "Encoder",
    "FeatureCache",
    "ImageItem",
    "ImagePreprocess",
    "ImageReadError",
    "LayersEncoder",
    "MiniLM",
    "Modality",
    "ModuleEncoder",
    "OpenCLIP",
    "SentenceTransformerEncoder",
    "TimmBackbone",
    "TorchEncoder",
    "TorchvisionBackbone",
    "TransformersCLIP",
    "TransformersSigLIP",
    "UnreadableInputError",
    "get_encoder",
    "get_encoders",
    "imagenet_classes",
    "known_encoders",
    "load_image",
]
