"""The errors of a server that does not take a request."""

from __future__ import annotations

from fxopt.errors import FxoptError


class QueueFull(FxoptError):
    """As many requests wait as the queue holds; the request was not taken."""


class ServerClosed(FxoptError):
    """The server takes no more requests: it was closed, or its threads stayed behind in a fork."""
