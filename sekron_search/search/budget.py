"""Budgets: upper bounds on costs of the whole network, absolute or relative to the original."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sekron_search.errors import ConfigError

CostName = Literal["flops", "params", "latency_ms", "peak_activation_bytes"]

#: The costs that can be budgeted, and their units in words.
COSTS: dict[CostName, str] = {
    "flops": "multiply-adds per sample",
    "params": "parameters",
    "latency_ms": "ms per batch",
    "peak_activation_bytes": "bytes per batch",
}
COST_NAMES: tuple[CostName, ...] = get_args(CostName)


#: What costs may exceed their bounds by, relative to them: the rounding of sums.
ROUNDING = 1e-9


def meets(costs: Mapping[Any, float], bounds: Mapping[CostName, float]) -> bool:
    """Whether costs are within their bounds."""
    return all(costs[name] <= bound * (1 + ROUNDING) for name, bound in bounds.items())


@dataclass(frozen=True)
class Bound:
    """An upper bound: absolute, or a multiple of the original's cost."""

    value: float
    relative: bool

    @classmethod
    def parse(cls, value: Any, where: str) -> Bound:
        """From a positive number, or text such as "0.5x".

        Raises:
            ConfigError: If it is neither.
        """
        wanted = f"{where}: expected a positive number, or a multiple of the original such as '0.5x', got {value!r}"
        relative = isinstance(value, str) and value.strip().lower().endswith("x")
        try:
            number = float(value.strip()[:-1] if relative else value)
        except (TypeError, ValueError):
            raise ConfigError(wanted) from None
        if isinstance(value, bool) or not math.isfinite(number) or number <= 0:
            raise ConfigError(wanted)
        return cls(number, relative)

    def resolve(self, original: float) -> float:
        """The absolute bound."""
        return self.value * original if self.relative else self.value

    def __str__(self) -> str:
        # Every digit: what is written here is read again as a bound, and names folders.
        return repr(self.value).removesuffix(".0") + ("x" if self.relative else "")


@dataclass(frozen=True)
class Budget:
    """Upper bounds on any of flops, params, latency_ms and peak_activation_bytes, together.

    Each is a number or a multiple of the original's cost as text ("0.5x"); None leaves the cost free.

    Args:
        flops: Multiply-adds per sample, as fvcore counts them.
        params: Parameters.
        latency_ms: Milliseconds of one forward pass on the example inputs.
        peak_activation_bytes: Bytes of activations that are alive at a time, in one such pass.

    Raises:
        ConfigError: If a bound is not such a value, or none is given.
    """

    flops: float | str | None = None
    params: float | str | None = None
    latency_ms: float | str | None = None
    peak_activation_bytes: float | str | None = None

    def __post_init__(self) -> None:
        if not dict(self.items()):
            raise ConfigError(f"budget: expected at least one of {', '.join(COST_NAMES)}")

    @classmethod
    def of(cls, value: Budget | Mapping[str, Any]) -> Budget:
        """From a mapping such as {"flops": "0.5x"}.

        Raises:
            ConfigError: If it is no mapping, or a key is not the name of a cost.
        """
        if isinstance(value, Budget):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f'budget: expected a mapping such as {{"flops": "0.5x"}}, got {value!r}')
        if unknown := sorted(set(value) - set(COST_NAMES)):
            raise ConfigError(f"budget: unknown cost {unknown[0]!r}; expected any of {', '.join(COST_NAMES)}")
        return cls(**value)

    def items(self) -> Iterator[tuple[CostName, Bound]]:
        """(cost, bound) of every budgeted cost."""
        for name in COST_NAMES:
            value = getattr(self, name)
            if value is not None:
                bound = Bound.parse(value, f"budget.{name}")
                if name != "latency_ms" and not bound.relative and bound.value < 1:
                    raise ConfigError(
                        f"budget.{name}: {value!r} is less than one, in {COSTS[name]}; for a multiple of the original "
                        f"write '{bound}x'"
                    )
                yield name, bound

    @property
    def names(self) -> tuple[CostName, ...]:
        """The budgeted costs."""
        return tuple(name for name, _ in self.items())

    def resolve(self, original: Mapping[str, float]) -> dict[CostName, float]:
        """Absolute bounds for an original network of these costs."""
        return {name: bound.resolve(original[name]) for name, bound in self.items()}
