"""The exceptions of the package. Each message says what was expected, what came, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the machine or of a GPU, was what lacked.

    Torch has no class of its own for the former. That for the latter is known by its name: nothing here needs torch.
    """
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


class SekronError(Exception):
    """Base of every error this package raises on purpose."""


class StructureError(SekronError, ValueError):
    """A structure, its text form or its factors are inconsistent."""


class UnsupportedLayerError(SekronError, ValueError):
    """A layer cannot be replaced without changing what it computes."""


class ConfigError(SekronError, ValueError):
    """A configuration, search space, budget or device profile is not valid; names the file and the key."""


class DataError(SekronError, ValueError):
    """Data, weights or a model do not fit together (shapes, labels, NaN, missing files)."""


@contextmanager
def users_own(what: str) -> Iterator[None]:
    """While a function of the user's runs: whatever goes wrong in it is a `DataError` that names it.

    Not so errors of this package, and memory that lacks, which say enough.

    Args:
        what: How the message begins, such as "finetune.loss 'mine:loss': it failed".
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SekronError) or is_out_of_memory(error):
            raise
        raise DataError(f"{what}: {type(error).__name__}: {error}") from error


class DivergedError(DataError):
    """A training's loss, or a weight, became NaN or infinite.

    Args:
        message: Where.
        curve: Epoch, loss and metric of the epochs before, all of them good.
    """

    def __init__(self, message: str, curve: Sequence[Mapping[str, float]] = ()) -> None:
        super().__init__(message)
        self.curve = [dict(row) for row in curve]


class InfeasibleBudgetError(SekronError):
    """No assignment of options meets the budgets.

    Args:
        message: What was asked.
        best: For every budgeted cost, the smallest value that any assignment reaches on its own.
    """

    def __init__(self, message: str, best: dict[str, float]) -> None:
        super().__init__(message)
        self.best = best


class RunFolderError(SekronError):
    """A run folder or an artefact is missing, damaged, locked, or of another version."""


class StorageError(SekronError):
    """The storage of a study cannot be opened or reached, or holds another study."""


class WorkerError(SekronError):
    """A process that worked for this one ended, or failed; names what it worked on."""
