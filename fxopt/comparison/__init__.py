"""Comparing models: in speed, size, memory, and in what they compute."""

from fxopt.comparison.measure import compare
from fxopt.comparison.race import Latency, Ratio
from fxopt.comparison.result import Comparison, Row, Throughput

__all__ = ["Comparison", "Latency", "Ratio", "Row", "Throughput", "compare"]
