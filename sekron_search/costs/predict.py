"""The latency model: a roofline times a Gaussian process on what it leaves over, fitted to measured operations.

Of every regime of operations, log(latency / roofline) is a Gaussian process over the logarithms of the sizes. It gives
each prediction an uncertainty, and sums one that knows how much the errors of alike operations have in common.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, nnls
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from threadpoolctl import threadpool_limits

from sekron_search.costs.features import features, regime, roofline
from sekron_search.costs.measure import Latency
from sekron_search.costs.operations import Operation

Array = npt.NDArray[np.float64]

#: Hyper-parameters are fitted to so many operations of a regime; their likelihood costs the cube of that. More, or more
#: steps, were not measured to lower the cross-validated error.
FITTED, STEPS = 300, 60

#: Of the linear algebra. The matrices are small: on a busy machine, several threads were measured ten times slower.
THREADS = 1

#: Folds of the cross-validation.
FOLDS = 5

#: Operations of a regime below which there is a roofline alone.
FEWEST = 20

#: Floor of a roofline, in ms.
LEAST_MS = 1e-4


@dataclass(frozen=True)
class Prediction:
    """Milliseconds, and the standard deviation of the error to expect."""

    ms: float
    std_ms: float


@dataclass(frozen=True)
class Validation:
    """Cross-validated errors, relative to what was measured, and the rank correlation with it."""

    median: float
    mean: float
    p90: float
    spearman: float
    operations: int

    @classmethod
    def of(cls, predicted: Array, measured: Array) -> Validation:
        """Of held-out predictions."""
        errors = np.abs(predicted / measured - 1)
        rank = spearmanr(predicted, measured).statistic if len(measured) > 2 else np.nan
        middle, high = np.quantile(errors, [0.5, 0.9])
        return cls(float(middle), float(errors.mean()), float(high), float(np.nan_to_num(rank)), len(measured))


@dataclass(frozen=True)
class Hyperparameters:
    """What is not computed again when a profile is loaded.

    Args:
        log_kernel: Logarithms of the kernel's parameters, of every regime that has a process.
        inflation: Of every such regime, how much larger held-out errors were than the process expected.
    """

    log_kernel: dict[str, list[float]] = field(default_factory=dict)
    inflation: dict[str, float] = field(default_factory=dict)


class LatencyModel:
    """Predicts latencies of operations from measured ones.

    Args:
        measured: Latencies of operations; needed of every regime that will be asked for.
        granularity: Multiple of channels at which time steps.
        known: Hyper-parameters; fitted if None.
        node_ms: What every operation costs besides, on top of what was measured.
    """

    def __init__(
        self,
        measured: Mapping[Operation, Latency],
        granularity: int,
        *,
        known: Hyperparameters | None = None,
        node_ms: float = 0.0,
    ) -> None:
        groups: dict[str, list[tuple[Operation, float]]] = {}
        for operation, latency in measured.items():
            groups.setdefault(regime(operation), []).append((operation, latency.median_ms))
        self._regimes = {name: _Regime(pairs, granularity) for name, pairs in groups.items()}
        self.hyperparameters = self._fitted() if known is None else known
        self.node_ms = node_ms
        self._cache: dict[Operation, Prediction] = {}

    def _fitted(self) -> Hyperparameters:
        found = Hyperparameters()
        with threadpool_limits(THREADS):
            for name, data in self._regimes.items():
                if len(data.log_measured) >= FEWEST:
                    theta = data.fit_kernel()
                    found.log_kernel[name] = theta.tolist()
                    found.inflation[name] = data.cross_validated(theta).inflation
        return found

    @property
    def regimes(self) -> list[str]:
        """Names of the groups of operations that can be predicted."""
        return list(self._regimes)

    def predict(self, operations: Sequence[Operation]) -> list[Prediction]:
        """Of each operation; those asked for before come from a cache.

        Raises:
            KeyError: If no operation of the regime was measured.
        """
        groups: dict[str, list[Operation]] = {}
        for operation in dict.fromkeys(operations):
            if operation not in self._cache:
                groups.setdefault(regime(operation), []).append(operation)
        for name, group in groups.items():
            log_ms, std = self._regimes[name].predict(group, self._theta(name))
            spread = std * self.hyperparameters.inflation.get(name, 1.0)
            for operation, mean, deviation in zip(group, np.exp(log_ms), spread, strict=True):
                self._cache[operation] = Prediction(float(mean) + self.node_ms, float(mean * deviation))
        return [self._cache[operation] for operation in operations]

    def predict_sum(self, operations: Sequence[Operation]) -> Prediction:
        """Of all operations together, errors of operations of one regime correlated as the process says."""
        total = sum(p.ms for p in self.predict(operations))
        counts: dict[str, dict[Operation, int]] = {}
        for operation in operations:
            own = counts.setdefault(regime(operation), {})
            own[operation] = own.get(operation, 0) + 1
        variance = 0.0
        for name, own in counts.items():
            covariance = self._regimes[name].covariance(list(own), self._theta(name))
            weights = np.array([n * (self._cache[o].ms - self.node_ms) for o, n in own.items()])
            variance += float(weights @ covariance @ weights) * self.hyperparameters.inflation.get(name, 1.0) ** 2
        return Prediction(total, variance**0.5)

    @cached_property
    def validations(self) -> dict[str, Validation]:
        """Cross-validated errors of every regime that has a process, and of "all" of them."""
        found, predicted, measured = {}, [], []
        for name, theta in self.hyperparameters.log_kernel.items():
            data = self._regimes[name]
            with threadpool_limits(THREADS):
                held_out = data.cross_validated(np.array(theta)).log_predicted
            predicted.append(np.exp(held_out))
            measured.append(np.exp(data.log_measured))
            found[name] = Validation.of(predicted[-1], measured[-1])
        if predicted:
            found["all"] = Validation.of(np.concatenate(predicted), np.concatenate(measured))
        return found

    def roofline_weights(self, name: str) -> Array:
        """Milliseconds per unit of every column of `features.roofline`, of a regime."""
        return self._regimes[name].weights

    def _theta(self, name: str) -> Array | None:
        theta = self.hyperparameters.log_kernel.get(name)
        return None if theta is None else np.array(theta)


@dataclass(frozen=True)
class _HeldOut:
    log_predicted: Array
    inflation: float


class _Regime:
    """Operations of one regime, and the roofline and the process that are fitted to them."""

    def __init__(self, pairs: Sequence[tuple[Operation, float]], granularity: int) -> None:
        self.granularity = granularity
        operations = [operation for operation, _ in pairs]
        self.log_measured = np.log([ms for _, ms in pairs])
        self.columns = self._columns(operations)
        self.weights = _roofline_weights(self.columns, self.log_measured)
        raw = self._raw_features(operations)
        self.center, self.scale = raw.mean(0), raw.std(0)
        self.varying = self.scale > 0
        self.inputs = self._scaled(raw)
        self._process: GaussianProcessRegressor | None = None

    def _columns(self, operations: Sequence[Operation]) -> Array:
        return np.array([roofline(operation, self.granularity) for operation in operations])

    def _raw_features(self, operations: Sequence[Operation]) -> Array:
        raw = np.array([features(operation, self.granularity) for operation in operations])
        return np.column_stack([raw, _log_base(self._columns(operations), self.weights)])

    def _scaled(self, raw: Array) -> Array:
        return np.asarray((raw - self.center)[:, self.varying] / self.scale[self.varying])

    def fit_kernel(self) -> Array:
        """Logarithms of the kernel's parameters, of largest marginal likelihood on some of the operations."""
        chosen = np.random.default_rng(0).permutation(len(self.inputs))[:FITTED]
        return np.asarray(self._fit(chosen, None).kernel_.theta)

    def cross_validated(self, theta: Array) -> _HeldOut:
        """Every operation predicted from the others, a fold at a time; roofline and process fitted anew."""
        folds = np.random.default_rng(0).permutation(len(self.inputs)) % FOLDS
        predicted, std = np.empty(len(folds)), np.empty(len(folds))
        for fold in range(FOLDS):
            held, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
            weights = _roofline_weights(self.columns[rest], self.log_measured[rest])
            process = self._fit(rest, theta, weights)
            left, std[held] = process.predict(self.inputs[held], return_std=True)
            predicted[held] = left + _log_base(self.columns[held], weights)
        standardised = (self.log_measured - predicted) / std
        return _HeldOut(predicted, max(1.0, float(np.sqrt(np.mean(standardised**2)))))

    def predict(self, operations: Sequence[Operation], theta: Array | None) -> tuple[Array, Array]:
        """Logarithms of milliseconds and their standard deviations."""
        base = _log_base(self._columns(operations), self.weights)
        if theta is None:
            return base, np.full(len(base), self._base_spread)
        left, std = self._full(theta).predict(self._scaled(self._raw_features(operations)), return_std=True)
        return base + left, std

    def covariance(self, operations: Sequence[Operation], theta: Array | None) -> Array:
        """Of the logarithms of the operations' latencies."""
        if theta is None:
            return np.full((len(operations), len(operations)), self._base_spread**2)
        inputs = self._scaled(self._raw_features(operations))
        return np.asarray(self._full(theta).predict(inputs, return_cov=True)[1])

    @property
    def _base_spread(self) -> float:
        left = self.log_measured - _log_base(self.columns, self.weights)
        return float(np.sqrt(np.mean(left**2))) + 0.1

    def _full(self, theta: Array) -> GaussianProcessRegressor:
        if self._process is None:
            self._process = self._fit(np.arange(len(self.inputs)), theta)
        return self._process

    def _fit(self, rows: npt.NDArray[np.intp], theta: Array | None, weights: Array | None = None) -> Any:
        """The process on some operations; its kernel fitted if `theta` is None."""
        used = self.weights if weights is None else weights
        left = self.log_measured[rows] - _log_base(self.columns[rows], used)
        scales = np.full(self.inputs.shape[1], 3.0)
        kernel = ConstantKernel(0.3, (1e-3, 10)) * Matern(scales, (0.2, 100), nu=1.5) + WhiteKernel(0.02, (1e-4, 1))
        if theta is not None:
            kernel = kernel.clone_with_theta(theta)
        process = GaussianProcessRegressor(kernel, optimizer=_optimum if theta is None else None)
        with warnings.catch_warnings():
            # A parameter at its bound says that a feature does not matter, which is as good an answer as any.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return process.fit(self.inputs[rows], left)


def _optimum(objective: Callable[..., Any], start: Array, bounds: Array) -> tuple[Array, float]:
    """In the form in which scikit-learn asks for an optimizer."""
    found = minimize(objective, start, method="L-BFGS-B", jac=True, bounds=bounds, options={"maxiter": STEPS})
    return found.x, found.fun


def _roofline_weights(columns: Array, log_measured: Array) -> Array:
    """Least squares of relative errors, no weight negative."""
    return np.asarray(nnls(columns / np.exp(log_measured)[:, None], np.ones(len(columns)))[0])


def _log_base(columns: Array, weights: Array) -> Array:
    return np.asarray(np.log(np.maximum(columns @ weights, LEAST_MS)))
