"""Coverage-guided fuzzing by the tests of this folder, for as long as you like.

    python -m tests.fuzz test_structures --seconds 600 [--corpus DIR]

What is found is printed as the test's own failure, and the input that led to it is written to the working directory.
Needs the extra `fuzz` (atheris).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["sekron_search"]):
    from tests.fuzz import test_folders, test_texts

TESTS: dict[str, Any] = {
    name: test
    for module in (test_texts, test_folders)
    for name, test in vars(module).items()
    if name.startswith("test_")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", choices=TESTS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="folder of inputs to begin with, and to add to")
    args = parser.parse_args()
    options = [f"-max_total_time={args.seconds}", "-print_final_stats=1", "-len_control=0", "-max_len=4096"]
    corpus = [] if args.corpus is None else [str(args.corpus)]
    atheris.Setup([sys.argv[0], *options, *corpus], TESTS[args.test].hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
