"""Twofold super-resolution under budgets of half and a quarter of the flops.

    python -m benchmarks.super_resolution --data DIR [--seeds 0 1 2] [--runs DIR]

DIR holds data/sr_hr.tar. The network is trained first, on BSD100, unless --runs holds its weights already. Killed runs
are gone on with. Everything is chosen on Set14; Set5 is looked at once, at the end of every run. PSNR is of the luma.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.command import parser_of, run_config
from benchmarks.results_file import Target, budget_targets, write_results
from benchmarks.super_resolution.plot import plot
from benchmarks.super_resolution.train import train
from sekron_search.api import job_from_config
from sekron_search.config import Config
from sekron_search.files import read_json
from sekron_search.progress import ConsoleReporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder

TEMPLATE = Path(__file__).parent / "config.yaml"

#: By budget of flops, what may be lost at most, in dB.
CASES = {"0.5x": 0.05, "0.25x": 0.15}


def config_of(archive: Path, weights: Path, budget: str, seed: int, tables: Path) -> Config:
    """The configuration of a run."""
    return run_config(
        TEMPLATE,
        model="benchmarks.super_resolution.network:Edsr",
        weights=weights,
        data="benchmarks.super_resolution.data:super_resolution",
        archive=archive,
        budget={"flops": budget},
        seed=seed,
        tables=tables.resolve(),
    )


def main() -> None:
    args = parser_of(__doc__, "super_resolution", seeds=[0]).parse_args()
    archive, weights = args.data / "data/sr_hr.tar", args.runs / "edsr.safetensors"
    args.runs.mkdir(parents=True, exist_ok=True)
    if not weights.exists():
        train(archive, weights)
    targets, samples = [], []
    for seed in args.seeds:
        for budget, most in CASES.items():
            config = config_of(archive, weights, budget, seed, args.runs / "tables")
            folder = RunFolder(args.runs / f"flops-{budget}-seed-{seed}")
            report = run(job_from_config(config), folder, ConsoleReporter(), resume=True)
            drops = {
                "Set14": read_json(folder.original)["validation_metric"] - report["validation_metric"],
                "Set5": report["original"]["metric"] - report["compressed"]["metric"],
            }
            for name, drop in drops.items():
                what = f"PSNR lost on {name} at {budget} flops, dB, seed {seed}"
                targets.append(Target(what, drop, most, at_least=False))
            targets += budget_targets(report, f"{budget}, seed {seed}")
            keys = (
                "original",
                "compressed",
                "metric_without_training",
                "validation_metric",
                "budgets",
                "curve",
                "learning_rate",
                "layers",
            )
            samples.append({"budget": budget, "seed": seed, "drops_db": drops, **{key: report[key] for key in keys}})
    path = write_results("super_resolution", targets, samples, command="make bench NAME=super_resolution DATA=...")
    folders = {budget: args.runs / f"flops-{budget}-seed-{args.seeds[0]}" for budget in CASES}
    plot(archive, weights, folders, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
