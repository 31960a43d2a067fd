"""The learning rate of fine-tuning: found, not guessed, by short trainings from where the long one will start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from torch import nn

from sekron_search.data import Batch
from sekron_search.errors import DataError, DivergedError
from sekron_search.files import read_json, write_json
from sekron_search.finetune import Distillation
from sekron_search.model import copy_model
from sekron_search.progress import Reporter

#: Rates that are tried are this one times powers of the factor, in a range beyond which none is.
START, FACTOR, RANGE = 1e-3, 10**0.5, range(-8, 7)

#: A trial takes this share of the steps of the training, up to so many. Shorter ones find rates that are too low: 66
#: steps a third of what 128 find (ResNet-20 at 0.5x and 0.15x of the flops).
SHARE, MOST_STEPS = 1 / 16, 128

#: A longer training is best at a higher rate than a trial, for it has the time to recover: by the square root of how
#: many times as many steps it takes, up to so many times, and up to this rate. What was measured goes no further, and
#: where trials are best beyond this rate networks have far to go, and already go as fast as they can.
MOST_TIMES, HIGHEST_RAISED = 32, 1e-2

#: Batches on which trials are compared.
COMPARED = 8


@dataclass(frozen=True)
class Found:
    """A learning rate, and what was tried.

    Args:
        learning_rate: The highest of the schedule.
        best_in_trials: The one that is best for short trainings.
        trials: Pairs of a rate and the loss that a short training reached with it; None where it diverged.
    """

    learning_rate: float
    best_in_trials: float
    trials: tuple[tuple[float, float | None], ...]


def tuned(distillation: Distillation, network: nn.Module, path: Path, reporter: Reporter) -> Distillation:
    """A distillation that leaves nothing open: its learning rate is the configuration's, or is found, once.

    Args:
        distillation: How the network will be trained.
        network: As it is before; not changed.
        path: Where what was found is kept.
        reporter: Told of the progress.
    """
    asked, distillation = distillation.config.batch_norm, distillation.settled(network)
    if asked == "auto" and distillation.config.batch_norm == "trained":
        reporter.say("the network starts far from the original: the statistics of batch-norms are trained too")
    if distillation.config.learning_rate != "auto":
        return distillation
    if not path.exists():
        write_json(path, asdict(find_learning_rate(distillation, network, reporter)))
    return distillation.with_rate(read_json(path)["learning_rate"])


def trial_steps(total_steps: int) -> int:
    """Steps of a trial for a training of so many."""
    return max(min(int(total_steps * SHARE), MOST_STEPS), 1)


def trial_of(distillation: Distillation) -> Distillation:
    """The short training that stands for a long one."""
    return distillation.briefly(trial_steps(distillation.total_steps))


def find_learning_rate(distillation: Distillation, network: nn.Module, reporter: Reporter) -> Found:
    """Whole short trainings, warm-up and decay included, with rates around the best one so far.

    They are compared by the loss of the network's outputs, on batches that they have not seen, with batch-norm as
    in training: where statistics are not frozen they lag behind the weights after so few steps, and would decide.
    Errors of the layers' outputs, which short trainings are guided by to the end, are least at rates that are too high
    for the outputs, even of long trainings. The best rate of trials is the minimum of a parabola through the best
    three, over the logarithm of the rate; the long training's is `raised`, unless trials diverge close above the best.

    Args:
        distillation: How the network will be trained.
        network: As it is before; not changed.
        reporter: Told of the progress.

    Raises:
        DataError: If training diverges at every rate.
    """
    distillation = distillation.settled(network)
    brief, losses = trial_of(distillation), dict[int, float]()
    seen = len(brief.data)
    # What comes after the batches that trials are trained on; those themselves where nothing does.
    compared = list(islice(distillation.data.epoch(1), seen, seen + COMPARED))
    compared = compared or list(islice(distillation.data.epoch(1), COMPARED))

    def loss(power: int) -> float:
        if power not in losses:
            losses[power] = _loss_after(brief.with_rate(START * FACTOR**power), network, compared, reporter)
        return losses[power]

    best = 0
    while math.isinf(loss(best)):
        best -= 1
        if best not in RANGE:
            raise DataError(
                "finetune.learning_rate 'auto': the loss becomes NaN or infinite at every rate down to "
                f"{START * FACTOR ** (best + 1):g}; check the training data, finetune.loss, and finetune.autocast"
            )
    while True:
        # Where rates are equally good the first of these is taken.
        better = min((p for p in (best, best - 1, best + 1) if p in RANGE), key=loss)
        if better == best:
            break
        best = better
    around = [losses.get(best + i, math.inf) for i in (-1, 0, 1)]
    rate = START * FACTOR ** (best + _minimum(*around))
    higher = raised(rate, distillation.total_steps / brief.total_steps) if math.isfinite(around[-1]) else rate
    tried = tuple(
        (START * FACTOR**power, losses[power] if math.isfinite(losses[power]) else None) for power in sorted(losses)
    )
    how = f"{rate:.2g} was best in {len(tried)} trials of {brief.total_steps} steps"
    reporter.say(f"learning rate {higher:.2g}: {how}")
    return Found(higher, rate, tried)


def raised(rate: float, times: float) -> float:
    """The learning rate of a training of so many times as many steps as the trials in which a rate was best.

    Source: measured with Muon on networks of ResNet-20 (CIFAR-10), 3,510 steps for 109: they are best, or as good as at
    any other rate, at 3 to 9 times what trials found.
    """
    return max(rate, min(rate * math.sqrt(min(times, MOST_TIMES)), HIGHEST_RAISED))


def _minimum(left: float, middle: float, right: float) -> float:
    """Where, around the middle, a parabola through three values a unit apart is lowest; the middle one is the least."""
    bend = left - 2 * middle + right
    return 0.5 * (left - right) / bend if math.isfinite(bend) and bend > 0 else 0.0


def _loss_after(brief: Distillation, network: nn.Module, compared: Sequence[Batch], reporter: Reporter) -> float:
    """Of a short training, on some batches; infinity if it diverges."""
    with reporter.task(f"trying the learning rate {brief.rate:.2g}", len(brief.data)) as task:
        try:
            curve = brief.train(
                copy_model(network),
                checkpoint=None,
                measure=lambda trained: {"compared": brief.loss_of(trained, compared)},
                after_epoch=lambda row: False,
                progress=task.update,
            )
        except DivergedError:
            return math.inf
    loss = curve[-1]["compared"]
    return loss if math.isfinite(loss) else math.inf
