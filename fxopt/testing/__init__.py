"""Checks for authors of passes, rules and backends: inside fxopt and outside."""

from fxopt.testing.checks import (
    check_pass,
    noisy,
    op_counts,
    random_inputs_like,
    relative_error,
)

__all__ = ["check_pass", "noisy", "op_counts", "random_inputs_like", "relative_error"]
