"""Pruning: what to remove, how, and the proof."""
