"""Builds the reference of the Python interface from its docstrings: `python docs/reference.py [FOLDER]`."""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc
import pdoc.render

import sekron_search

#: What extensions are written against; see docs/extending.md.
EXTENSIONS = ("sekron_search.kron.enumeration", "sekron_search.proxies", "sekron_search.runtimes.base")


def main(folder: Path) -> None:
    """A page of the public names, and one of each module that extensions need."""
    # pdoc looks names up in the module, which imports them when they are first used.
    for name in sekron_search.__all__:
        setattr(sekron_search, name, getattr(sekron_search, name))
    pdoc.render.configure(docformat="google", search=False)
    pdoc.pdoc("sekron_search", "!sekron_search.", *EXTENSIONS, output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/docs"))
