"""Why attention that is written by hand stays as it is."""


class HeldBack(Exception):
    """Why a softmax is not fused, in words."""
