"""The Python interface: `compress` a network that is at hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sekron_search.config import make_settings
from sekron_search.data import input_batches, to_device
from sekron_search.errors import DataError
from sekron_search.export import Factory, check_factory, guess_factory, load
from sekron_search.finishing import Result, say_verdict
from sekron_search.job import Job, checked_metric
from sekron_search.model import Inputs, as_inputs, batch_size, copy_model, part_of, run_model
from sekron_search.progress import ConsoleReporter, Reporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import Budget
from sekron_search.team import Team
from sekron_search.training_data import TrainingData


def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: Budget | Mapping[str, float | str],
    calibration: Any,
    evaluate: Callable[[nn.Module], float] | None = None,
    test: Callable[[nn.Module], float] | None = None,
    train: Any = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    factory: str | None = None,
    **settings: Any,
) -> Result:
    """Find a compressed network that meets the budget, and write a run folder with the front and a report.

    Args:
        model: A trained network; it is not changed.
        example_inputs: What it takes: a tensor, or a tuple of arguments. Latency and peak memory are of this batch.
        budget: Upper bounds, e.g. {"flops": "0.5x", "latency_ms": 3.0}.
        calibration: Some hundreds of typical inputs without labels: a tensor, a tuple of tensors for a network of
            several arguments, a dataset, or an iterable of batches. Half of them fit the layers, half measure how far
            a compressed network is from the original.
        evaluate: Metric of a network for choosing among candidates, higher is better.
        test: Metric for the report, on data used nowhere else; by default `evaluate`. Reports call it by the function's
            name, or as `metric` says.
        train: For fine-tuning by distillation: a dataset or an iterable of (inputs, target) batches.
        out: Run folder; by default a new one in runs/.
        resume: Go on with the run that `out` holds.
        progress: Whether to show progress on standard error.
        factory: `package.module:function` that builds the architecture, so that `load(path)` can; found by itself
            where the network's class can be imported and needs no arguments.
        **settings: Keys of a configuration: space, calibration's and the other sections as mappings
            (`search={"trials": 60}`, `finetune={"epochs": 5}`, ...), metric, seed, device. The section `calibration`
            is given as `calibration_settings`.

    Raises:
        SekronError: On bad input; InfeasibleBudgetError carries the best that can be reached.
    """
    if not isinstance(model, nn.Module):
        raise DataError(f"model: expected an nn.Module, got {type(model).__name__}")
    if "calibration_settings" in settings:
        settings["calibration"] = settings.pop("calibration_settings")
    checked = make_settings(Budget.of(budget), settings)
    if (own := evaluate if test is None else test) is not None and "metric" not in settings:
        checked = checked.model_copy(update={"metric": f"evaluate:{_name_of(own)}"})
    device = torch.device(checked.device)
    inputs = to_device(as_inputs(example_inputs), device)
    batch_size(inputs)
    moved = copy_model(model).to(device)
    fit, holdout = _halves(to_device(input_batches(calibration, checked.calibration.batch_size), device))
    data = None
    if train is not None:
        data = TrainingData(train, checked.finetune.batch_size, seed=checked.seed)
    run_model(moved.eval(), inputs)
    _check_arguments(len(inputs), fit[0])
    if factory is None:
        named = guess_factory(moved, inputs)
    else:
        named = Factory(factory)
        check_factory(named, moved, inputs)
    job = Job(
        moved,
        inputs,
        fit,
        holdout,
        checked,
        validate=None if evaluate is None else checked_metric(evaluate, "evaluate"),
        test=None if test is None else checked_metric(test, "test"),
        train=data,
        factory=named,
    )
    folder = RunFolder.new() if out is None else RunFolder(out)
    reporter = ConsoleReporter() if progress else Reporter()
    report = run(job, folder, reporter, resume=resume)
    path = Path(Team.here().told(str(folder.path)))
    say_verdict(report, RunFolder(path), reporter)
    return Result(load(path, model=model if named is None else None), report, path, job)


def _name_of(metric: Callable[[nn.Module], float]) -> str:
    """What reports call a metric."""
    name = getattr(metric, "__name__", "")
    return name if name.isidentifier() else "metric"


def _check_arguments(expected: int, batch: Inputs) -> None:
    """Raise a `DataError` unless calibration batches have as many arguments as the example."""
    if len(batch) != expected:
        raise DataError(
            f"calibration: the example inputs are {expected} arguments of the network, a calibration batch gives "
            f"{len(batch)}. A batch is (inputs, target), inputs a tuple of {expected}: write ((a, b), None) for two "
            "arguments a and b without a target, or give a tuple of tensors, one for each argument"
        )


def _halves(found: list[Inputs]) -> tuple[list[Inputs], list[Inputs]]:
    """Calibration batches in two parts of about equal numbers of samples.

    Batches stay whole, unless one part would get less than a third so: then the one in the middle is cut in two.
    """
    seen = list(accumulate(map(batch_size, found)))
    total = seen[-1]
    if total < 2:
        raise DataError("calibration: expected at least two samples, got one")
    at = min(range(1, len(found)), key=lambda i: (abs(2 * seen[i - 1] - total), -i), default=0)
    if at and 3 * min(seen[at - 1], total - seen[at - 1]) >= total:
        return found[:at], found[at:]
    middle = next(i for i, count in enumerate(seen) if count > total // 2)
    left = total // 2 - (seen[middle] - batch_size(found[middle]))
    first, second = part_of(found[middle], slice(left)), part_of(found[middle], slice(left, None))
    return [*found[:middle], first], [second, *found[middle + 1 :]]
