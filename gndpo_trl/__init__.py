"""On-policy distillation for language and vision-language models, as an extension of TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import GNDPOConfig
    from .trainer import GNDPOTrainer


__all__ = ["GNDPOConfig", "GNDPOTrainer"]
__version__ = "0.1.0"

_MODULES = {"GNDPOConfig": ".config", "GNDPOTrainer": ".trainer"}


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: TRL and torch take seconds to load, and the run report needs neither.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_MODULES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
