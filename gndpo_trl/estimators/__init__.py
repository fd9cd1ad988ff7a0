"""What the gradient at a sampled position looks at, and what it has to know for that."""

from .estimator import Estimator, Sampled
from .models import Models
from .reading import Reading


__all__ = ["Estimator", "Models", "Reading", "Sampled"]
