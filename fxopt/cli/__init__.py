"""The `fxopt` command. Exit codes: 0 done, 1 the job failed, 2 it was asked for wrongly."""

from __future__ import annotations

import click

import fxopt
from fxopt.cli.bisect import bisect_command
from fxopt.cli.compare import compare_command
from fxopt.cli.compile import compile_command
from fxopt.cli.explain import explain_command
from fxopt.cli.listing import backends_command, passes_command
from fxopt.cli.profile import profile_command
from fxopt.cli.show import show_command
from fxopt.cli.view import view_command


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="A MODEL is module:callable, path.py:callable, an artefact that fxopt wrote, or a .pt2 "
    "file with --trust. A class or function is called without arguments; a torch.nn.Module is used "
    "as it is.",
)
@click.version_option(fxopt.__version__, prog_name="fxopt")
def main() -> None:
    """Optimize PyTorch models for inference, and say what was done to them."""


main.add_command(compile_command)
main.add_command(compare_command)
main.add_command(show_command)
main.add_command(view_command)
main.add_command(explain_command)
main.add_command(bisect_command)
main.add_command(profile_command)
main.add_command(passes_command)
main.add_command(backends_command)

__all__ = ["main"]
