"""Training of VoCo models and of the systems they are compared with, on transformers' Trainer and accelerate."""

from .config import DataConfig, LoraConfig, ObjectiveConfig, TrainingConfig, VideoConfig
from .run import TrainingResult, train

__all__ = [
    "DataConfig",
    "LoraConfig",
    "ObjectiveConfig",
    "TrainingConfig",
    "TrainingResult",
    "VideoConfig",
    "train",
]
