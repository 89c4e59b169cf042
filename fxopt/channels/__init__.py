"""Channels by identity: which indices of which tensors must go together."""
