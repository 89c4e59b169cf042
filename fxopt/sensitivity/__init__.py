"""Sensitivity: how much a model suffers when one layer at a time loses channels."""

from fxopt.sensitivity.measure import sensitivity
from fxopt.sensitivity.result import Row, Sensitivity

__all__ = ["Row", "Sensitivity", "sensitivity"]
