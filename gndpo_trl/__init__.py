"""On-policy distillation for language and vision-language models, as an extension of TRL."""

from .config import GNDPOConfig
from .trainer import GNDPOTrainer


__all__ = ["GNDPOConfig", "GNDPOTrainer"]
__version__ = "0.1.0"
