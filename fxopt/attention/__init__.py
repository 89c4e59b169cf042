"""Attention that is written by hand: its products, masks and axes, and the one call for it.

Read in this order: `products` (what a product sums over), `scores` (what lies between the two
products), `mask_sizes` (how large the numbers in a mask are), `axes` (which axis is which),
`fusion` (the call).
"""
