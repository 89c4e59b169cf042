"""oneDNN without PyTorch between: kernels made once, called in microseconds (see `library`)."""

from fxopt.backends.eager.onednn.library import OneDnnError, library

__all__ = ["OneDnnError", "library"]
