"""Importance: scores that say which channels matter, by name, as objects, or as a function."""

from fxopt.pruning.importance.activations import Activations
from fxopt.pruning.importance.chance import Random
from fxopt.pruning.importance.contract import Importance, score
from fxopt.pruning.importance.gradients import Hessian, Taylor
from fxopt.pruning.importance.magnitude import L1, L2, Lamp
from fxopt.pruning.importance.median import GeometricMedian
from fxopt.pruning.importance.naming import importance_of
from fxopt.pruning.importance.norms import BnScale

__all__ = [
    "Activations",
    "BnScale",
    "GeometricMedian",
    "Hessian",
    "Importance",
    "L1",
    "L2",
    "Lamp",
    "Random",
    "Taylor",
    "importance_of",
    "score",
]
