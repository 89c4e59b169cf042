"""Reconstruction: fit the layers of a smaller graph to the outputs of the larger, without training.

    original ── runs on the data ──▶ what each layer returned, at sampled positions
    smaller  ── runs node by node, all batches at once; at each layer:
                    rows that it reads  ×  weights  ≈  what the original's returned
                    least squares for the weights, kept where they fit better on rows held out

A layer thus makes good what the layers before it have lost. See `walk.reconstruct`.
"""

from fxopt.reconstruction.record import Fit, Reconstruction
from fxopt.reconstruction.walk import reconstruct

__all__ = ["Fit", "Reconstruction", "reconstruct"]
