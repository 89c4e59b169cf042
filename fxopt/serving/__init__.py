"""Serving a compiled model: a queue, workers, batches made of requests, and what calls cost."""

from fxopt.serving.benchmark import Benchmark, WarmUp
from fxopt.serving.refusals import QueueFull, ServerClosed
from fxopt.serving.server import Server
from fxopt.serving.settings import ServerSettings
from fxopt.serving.tally import Statistics

__all__ = [
    "Benchmark",
    "QueueFull",
    "Server",
    "ServerClosed",
    "ServerSettings",
    "Statistics",
    "WarmUp",
]
