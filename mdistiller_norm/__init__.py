"""Knowledge distillation for image classifiers, built around NormKD (Chi et al., 2023)."""

__version__ = "0.1.0"
