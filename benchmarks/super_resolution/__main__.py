"""A picture of twofold super-resolution by the original network and by those under half and a quarter of its flops.

    python -m benchmarks.super_resolution --data DIR [--runs DIR]

The networks are those of `python -m benchmarks.accuracy --networks edsr --seeds 0`, which are made first if --runs does
not hold them. DIR holds data/sr_hr.tar.
"""

from __future__ import annotations

from benchmarks.accuracy.__main__ import CASES, EPOCHS
from benchmarks.command import parser_of
from benchmarks.results_file import RESULTS
from benchmarks.runs import Runs
from benchmarks.super_resolution.config import archive_of
from benchmarks.super_resolution.plot import plot


def main() -> None:
    args = parser_of(__doc__, "accuracy").parse_args()
    runs = Runs("edsr", args.data, args.runs)
    made = {budget: runs.run({"flops": budget}, epochs=EPOCHS) for budget in CASES["edsr"]}
    for budget, own in made.items():
        print(f"{budget} flops: {own.report['compressed']['metric']:.3f} dB on Set5")
    networks = {f"{budget} flops": own.network for budget, own in made.items()}
    original = next(iter(made.values())).job.model
    path = RESULTS / "super_resolution.png"
    plot(archive_of(args.data), {"original": original, **networks}, path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
