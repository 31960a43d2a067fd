"""Proxies: what foretells, without training, how good a candidate will be after it. From cheap to dear."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from sekron_search.assembly import Assembler
from sekron_search.divergence import divergence as output_divergence
from sekron_search.errors import DataError, users_own
from sekron_search.model import Inputs, part_of
from sekron_search.references import import_reference
from sekron_search.response import LinearResponse, normalised_outputs
from sekron_search.search.knapsack import additive_error, additive_errors, curvature_errors
from sekron_search.search.options import Assignment

#: Held-out samples of the proxy that looks at few.
FEW_SAMPLES = 64


class Judge:
    """What proxies share, computed once for all candidates, when it is first needed.

    Args:
        assembler: Makes and measures networks.
    """

    def __init__(self, assembler: Assembler) -> None:
        self.assembler, self.job = assembler, assembler.job
        self.network = assembler.tables.network

    @cached_property
    def proxies(self) -> dict[str, Proxy]:
        """The package's, and the user's own that the settings name.

        Raises:
            ConfigError: If one of these cannot be imported.
        """
        own = self.job.settings.audit.proxies
        return {**PROXIES, **{name: Proxy(import_reference(name, "audit.proxies"), name) for name in own}}

    @cached_property
    def response(self) -> LinearResponse:
        """What the outputs change by with every option."""
        return LinearResponse(self.assembler)

    @cached_property
    def few(self) -> Inputs:
        """Few held-out samples."""
        return part_of(self.job.holdout[0], slice(FEW_SAMPLES))

    @cached_property
    def few_outputs(self) -> list[Tensor]:
        """What the original makes of them."""
        return normalised_outputs(self.assembler.alone(0, 0), self.few)


class Subject:
    """A candidate under judgement.

    Args:
        judge: What it shares with others.
        assignment: Option of every layer.
    """

    def __init__(self, judge: Judge, assignment: Assignment) -> None:
        self.judge, self.assignment = judge, assignment
        self.options = judge.network.chosen(assignment)

    @cached_property
    def fitted(self) -> nn.Module:
        """The network fitted layer after layer, as it is before it is trained."""
        network = self.judge.assembler.assemble(self.assignment)
        self.judge.assembler.fit(network)
        return network


def flops(subject: Subject) -> float:
    """A proxy that knows no error at all: whatever is no better than this foretells nothing but the budget."""
    return -float(subject.judge.network.cost(subject.assignment, "flops"))


def weight_error(subject: Subject) -> float:
    """Sum over the layers of the squared relative error of the weight."""
    return float(sum(o.weight_error**2 for o in subject.options))


def output_error(subject: Subject) -> float:
    """Sum over the layers of the squared relative error of the layer's output on calibration inputs."""
    return float(sum(o.error**2 for o in subject.options))


def curvature(subject: Subject) -> float:
    """The same, weighted by how sensitive the network's outputs are to each layer."""
    return additive_error(curvature_errors(subject.judge.network), subject.assignment)


def responses(subject: Subject) -> float:
    """Sum over the layers of the divergence with that layer alone compressed: no interaction between layers at all."""
    response = subject.judge.response
    return sum(response.divergence_alone(layer, option) for layer, option in enumerate(subject.assignment))


def additive(subject: Subject) -> float:
    """Sum of the geometric means of curvature and response: what the knapsack minimises, from the tables alone."""
    return additive_error(additive_errors(subject.judge.network), subject.assignment)


def propagated(subject: Subject) -> float:
    """Divergence of the outputs when what each layer alone changes in them is added up: interactions to first order."""
    return subject.judge.response.divergence(subject.assignment)


def divergence_few(subject: Subject) -> float:
    """Divergence of the assembled network on few samples, by whose statistics its batch-norms normalise: one pass."""
    judge = subject.judge
    outputs = normalised_outputs(judge.assembler.with_factors(subject.assignment), judge.few)
    return float(output_divergence(judge.job.settings.search.divergence, outputs, judge.few_outputs))


def divergence(subject: Subject) -> float:
    """Divergence of the assembled network, on all held-out samples: what the search minimises."""
    return subject.judge.assembler.evaluate(subject.assignment).divergence


def divergence_fitted(subject: Subject) -> float:
    """Divergence of the network fitted layer after layer, on all held-out samples: what chooses what is trained."""
    return subject.judge.assembler.divergence(subject.fitted)


def untrained_metric(subject: Subject) -> float:
    """The metric of the network fitted layer after layer, on the validation split: needs labels, unlike the others."""
    assert subject.judge.job.validate is not None
    return -subject.judge.job.validate(subject.fitted)


@dataclass(frozen=True)
class Proxy:
    """A proxy by what people need to know of it.

    Args:
        score: Of a candidate; the smaller, the better it should be.
        label: In a few words.
        prepare: What has to be done first and is kept for other proxies; part of the cost of each.
        needs_labels: Whether labels of the validation split enter.
        knows_errors: Whether it looks at what a candidate gets wrong; not so the one that others are compared with.
    """

    score: Callable[[Subject], float]
    label: str
    prepare: Callable[[Subject], object] | None = None
    needs_labels: bool = False
    knows_errors: bool = True

    @property
    def is_cheap(self) -> bool:
        """Whether it needs neither a fit of the whole network nor labels, and is more than a budget in disguise."""
        return self.knows_errors and self.prepare is not _fit and not self.needs_labels


def _respond(subject: Subject) -> None:
    """Record the responses to the candidate's options that no candidate before it has had."""
    for layer, option in enumerate(subject.assignment):
        subject.judge.response.response(layer, option)


def _fit(subject: Subject) -> None:
    """Fit the network layer after layer."""
    _ = subject.fitted


#: By name, from cheap to dear.
PROXIES: dict[str, Proxy] = {
    "flops": Proxy(flops, "flops alone, for comparison", knows_errors=False),
    "weight_error": Proxy(weight_error, "weight error"),
    "output_error": Proxy(output_error, "output error, data-aware"),
    "curvature": Proxy(curvature, "output error weighted by curvature"),
    "additive": Proxy(additive, "what the knapsack adds up: curvature, and responses where measured"),
    "responses": Proxy(responses, "divergences with one layer compressed, added up", _respond),
    "propagated": Proxy(propagated, "divergence of outputs to which each layer's change is added", _respond),
    "divergence_few": Proxy(divergence_few, f"divergence on {FEW_SAMPLES} held-out samples"),
    "divergence": Proxy(divergence, "divergence on all held-out samples"),
    "divergence_fitted": Proxy(divergence_fitted, "divergence after the layer-by-layer fit", _fit),
    "untrained_metric": Proxy(
        untrained_metric, "validation metric before training (needs labels)", _fit, needs_labels=True
    ),
}


@dataclass(frozen=True)
class Scores:
    """What every proxy says of a candidate, and the seconds that it took."""

    values: dict[str, float]
    seconds: dict[str, float]


def score(subject: Subject, names: Sequence[str] | None = None) -> Scores:
    """The value of proxies, of all if none are named, each timed as if it were the only one."""
    values, seconds = {}, {}
    prepared: dict[Callable[[Subject], object], float] = {}
    proxies = subject.judge.proxies
    for name in proxies if names is None else names:
        proxy = proxies[name]
        if proxy.prepare is not None and proxy.prepare not in prepared:
            start = time.perf_counter()
            proxy.prepare(subject)
            prepared[proxy.prepare] = time.perf_counter() - start
        start = time.perf_counter()
        with users_own(f"audit.proxies {name!r}: it failed"):
            values[name] = float(proxy.score(subject))
        if not math.isfinite(values[name]):
            raise DataError(f"audit.proxies {name!r}: it returned {values[name]}; expected a finite number")
        seconds[name] = time.perf_counter() - start + (prepared[proxy.prepare] if proxy.prepare else 0.0)
    return Scores(values, seconds)
