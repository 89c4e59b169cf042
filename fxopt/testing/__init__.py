"""Checks for authors of passes, rules and backends: inside fxopt and outside."""

from fxopt.testing.checks import (
    check_pass,
    noisy,
    op_counts,
    random_inputs_like,
    relative_error,
)
from fxopt.testing.rules import Example, RuleCheck, check_rule

__all__ = [
    "Example",
    "RuleCheck",
    "check_pass",
    "check_rule",
    "noisy",
    "op_counts",
    "random_inputs_like",
    "relative_error",
]
