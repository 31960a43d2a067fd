"""How well proxies foretell accuracy after one epoch of fine-tuning: ResNet-20 on CIFAR-10, three budgets of flops.

    python -m benchmarks.proxies --data DIR [--runs DIR]

DIR holds data/cifar10_jpeg.tar.xz and models/resnet20_cifar10_jpeg.pt. Accuracy is that on the validation split. A run
that was killed goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.cifar10.config import config_of
from benchmarks.command import parser_of
from benchmarks.proxies.plot import plot
from benchmarks.results_file import Target, write_results
from sekron_search.assembly import Assembler
from sekron_search.audit import audit, check_audit, plan_audit
from sekron_search.jobs import job_from_config
from sekron_search.prepare import prepare
from sekron_search.progress import ConsoleReporter
from sekron_search.report.audit import best_cheap
from sekron_search.rundir import RunFolder

CONFIG = Path(__file__).parent / "config.yaml"


def main() -> None:
    args = parser_of(__doc__, "proxies").parse_args()
    job = job_from_config(config_of(args.data, CONFIG, tables=args.runs / "tables"))
    job.model.eval()
    check_audit(job)
    folder, reporter = RunFolder(args.runs / "run"), ConsoleReporter()
    with folder.claimed(job.fingerprint(), resume=True):
        tables = prepare(job, folder, reporter)
        planned = plan_audit(job, tables.network)
        record = audit(Assembler(job, tables), planned, folder, reporter)
    assert record is not None
    for proxy in record["proxies"]:
        within = ", ".join(f"{tau:.2f}" for tau in proxy["within"].values())
        print(
            f"{proxy['label']}: tau {proxy['tau']:.3f} ({proxy['low']:.2f} to {proxy['high']:.2f}), within budgets "
            f"{within}; {proxy['seconds']:.3g} s"
        )
    best = best_cheap(record)
    what = f"Kendall's tau of the best cheap proxy ({best['name']}) with accuracy after one epoch"
    targets = [
        Target(what, best["tau"], 0.8),
        Target("candidates", len(planned), 24),
        Target("budgets", len({p.budget for p in planned}), 3),
    ]
    path = write_results("proxies", targets, record, command="make bench NAME=proxies DATA=...")
    plot(path)


if __name__ == "__main__":
    main()
