"""What the gradient at a sampled position looks at, and what it has to know for that."""

from .estimator import Estimator, Sampled
from .passes import Passes
from .reading import Reading


__all__ = ["Estimator", "Passes", "Reading", "Sampled"]
