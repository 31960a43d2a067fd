"""Searches which tensor factorization structure each layer of a trained network should get, under a budget.

`compress` does the whole job; `load` opens what it made; `finish` makes another network of the same search.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sekron_search.api import compress
    from sekron_search.costs.profile import DeviceProfile
    from sekron_search.data import DataBundle
    from sekron_search.deployment import deploy
    from sekron_search.errors import InfeasibleBudgetError, SekronError
    from sekron_search.exchange import export_network
    from sekron_search.export import load
    from sekron_search.finishing import Result, finish
    from sekron_search.kron.conv import KroneckerConv, KroneckerConvTranspose
    from sekron_search.kron.linear import KroneckerLinear
    from sekron_search.kron.structure import Structure
    from sekron_search.search.budget import Budget
    from sekron_search.search.space import SearchSpace

__version__ = "0.1.0"

#: Where the public names live. They are imported when they are first used: the command line starts without torch.
_HOMES = {
    "Budget": "search.budget",
    "DataBundle": "data",
    "DeviceProfile": "costs.profile",
    "InfeasibleBudgetError": "errors",
    "KroneckerConv": "kron.conv",
    "KroneckerConvTranspose": "kron.conv",
    "KroneckerLinear": "kron.linear",
    "Result": "finishing",
    "SearchSpace": "search.space",
    "SekronError": "errors",
    "Structure": "kron.structure",
    "compress": "api",
    "deploy": "deployment",
    "export_network": "exchange",
    "finish": "finishing",
    "load": "export",
}

__all__ = [
    "Budget",
    "DataBundle",
    "DeviceProfile",
    "InfeasibleBudgetError",
    "KroneckerConv",
    "KroneckerConvTranspose",
    "KroneckerLinear",
    "Result",
    "SearchSpace",
    "SekronError",
    "Structure",
    "compress",
    "deploy",
    "export_network",
    "finish",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sekron_search' has no attribute {name!r}")
    return getattr(import_module(f"sekron_search.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
