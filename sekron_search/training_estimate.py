"""About how long the trainings of a run take, from a few steps of one."""

from __future__ import annotations

from dataclasses import dataclass

from sekron_search.costs.measure import Stopwatch
from sekron_search.data import SplitMetric
from sekron_search.finetune import Distillation
from sekron_search.job import Job
from sekron_search.learning_rate import FACTOR, START, trial_of
from sekron_search.model import copy_model, device_of
from sekron_search.progress import Reporter

#: Steps of the training that are timed, after one that is not.
STEPS = 3

#: Learning rates that are tried, as it mostly comes out.
RATES = 4

#: Evaluations for the choice between a network as it was fitted and as it is trained: theirs, and the original's,
#: of which a mirrored one takes another.
CHOICE = 3


@dataclass(frozen=True)
class Stage:
    """A part of a run: how much there is to do, and about how many seconds it takes."""

    name: str
    amount: str
    seconds: float


def training_stages(job: Job, metric_s: float, reporter: Reporter) -> list[Stage]:
    """Fine-tuning of all candidates to the end: successive halving may end some of them earlier.

    Args:
        job: The run.
        metric_s: Seconds of the validation metric.
        reporter: Told of the progress.
    """
    distillation, count = job.distillation, job.settings.finetune.candidates
    if distillation is None:
        return []
    reporter.say("measuring steps of the training")
    batch_s = _batch_seconds(job, distillation)
    found, tried = [], _tried_batches(distillation)
    if tried:
        steps = trial_of(distillation).total_steps
        found.append(Stage("learning rate", f"about {RATES} trainings of {steps} steps", tried * batch_s))
    epochs, batches = distillation.config.epochs, count * distillation.total_batches
    amount = f"{count} networks, {epochs} epochs, {batches:,} batches at most"
    choice = CHOICE + distillation.config.mirrored_teacher if isinstance(job.validate, SplitMetric) else 0
    evaluations = count * (epochs + choice)
    return [*found, Stage("fine-tuning", amount, batches * batch_s + evaluations * metric_s)]


def audit_stages(job: Job, fit_s: float, metric_s: float, reporter: Reporter) -> list[Stage]:
    """The audit's fits and trainings, its learning rate among them.

    Args:
        job: The run.
        fit_s: Seconds of the fits of a network, layer after layer.
        metric_s: Seconds of the validation metric.
        reporter: Told of the progress.
    """
    count, epochs = job.settings.audit.candidates, job.settings.audit.epochs
    if count == 0:
        return []
    reporter.say("measuring steps of the audit's training")
    distillation = job.distillation_by(job.settings.finetune.model_copy(update={"epochs": epochs}))
    batches = count * distillation.total_batches + _tried_batches(distillation)
    seconds = batches * _batch_seconds(job, distillation) + count * (fit_s + epochs * metric_s)
    return [Stage("audit", f"{count} networks, {epochs} epochs, {batches:,} batches", seconds)]


def _tried_batches(distillation: Distillation) -> int:
    """Of the trainings that look for the learning rate; 0 if it is given."""
    if distillation.config.learning_rate != "auto":
        return 0
    return RATES * trial_of(distillation).total_batches


def _batch_seconds(job: Job, distillation: Distillation) -> float:
    student = copy_model(job.model)
    distillation = distillation.settled(student)

    def train(steps: int) -> float:
        brief = distillation.briefly(steps).with_rate(START / FACTOR)
        watch = Stopwatch(device_of(job.teacher))
        brief.train(student, checkpoint=None, measure=None, after_epoch=lambda row: True, progress=lambda d: None)
        return watch.seconds()

    train(1)
    return train(STEPS) / min(STEPS * distillation.config.accumulate, len(distillation.data))
