"""Attention that is written by hand: its products, masks and axes, and the one call for it.

Read in this order: `products` (what a product sums over), `scores` (what lies between the two
products), `bounds` (how low a mask may be), `axes` (which axis is which), `fusion` (the call).
"""
