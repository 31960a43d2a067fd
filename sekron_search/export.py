"""The artefact: a compressed network as safetensors and JSON, and how it is opened again."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sekron_search.errors import DataError, RunFolderError, SekronError, users_own
from sekron_search.files import read_json, write_json
from sekron_search.kron.layer import KroneckerLayer
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.model import Inputs, kronecker_layers, layer_like, output_tensors, replace_layers
from sekron_search.references import import_reference
from sekron_search.runtimes.base import MemoryFormat, with_memory_format
from sekron_search.tensor_files import read_tensors, write_tensors

FORMAT = 3


@dataclass(frozen=True)
class Factory:
    """How the original architecture is built.

    Args:
        reference: `package.module:function`.
        kwargs: Its arguments.

    Raises:
        DataError: If they are anything else.
    """

    reference: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.reference, str) or not isinstance(self.kwargs, Mapping):
            raise DataError(
                "model.factory: expected 'package.module:function' and a mapping of its arguments, got "
                f"{self.reference!r:.80} and {self.kwargs!r:.80}"
            )

    def build(self) -> nn.Module:
        """The network, with whatever weights the factory gives it.

        Raises:
            ConfigError: If the factory cannot be imported.
            DataError: If it fails, or returns no network.
        """
        function = import_reference(self.reference, "model.factory")
        with users_own(f"model.factory {self.reference!r} failed"):
            model = function(**self.kwargs)
        if not isinstance(model, nn.Module):
            raise DataError(f"model.factory {self.reference!r} must return an nn.Module, got {type(model).__name__}")
        return model


def guess_factory(model: nn.Module, inputs: Inputs) -> Factory | None:
    """The class of the network, if it can be imported and, built without arguments, gives the same outputs."""
    kind = type(model)
    required = [
        p
        for p in list(inspect.signature(kind.__init__).parameters.values())[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required or "<" in kind.__qualname__ or kind.__module__ == "__main__" or kind.__module__.startswith("torch."):
        return None
    factory = Factory(f"{kind.__module__}:{kind.__qualname__}")
    return factory if _difference(factory, model, inputs) is None else None


def check_factory(factory: Factory, model: nn.Module, inputs: Inputs) -> None:
    """Raise a `DataError` unless the factory builds the network, but for its weights."""
    if (difference := _difference(factory, model, inputs)) is not None:
        raise DataError(f"factory {factory.reference!r} does not build the network that was given: {difference}")


def _difference(factory: Factory, model: nn.Module, inputs: Inputs) -> str | None:
    """In what the factory's network, with the weights of `model`, differs from it."""
    try:
        twin = factory.build()
        twin.load_state_dict(model.state_dict())
        if (held := next(itertools.chain(model.parameters(), model.buffers()), None)) is not None:
            twin.to(held.device)
        if _state(twin).keys() != _state(model).keys():  # it was tied after it had been built
            return "they share other weights among their layers"
        # Arguments that no shape shows (an activation, a stride) would make it another network: compare what it does.
        with torch.no_grad():
            pairs = list(zip(output_tensors(twin.eval()(*inputs)), output_tensors(model(*inputs)), strict=True))
    except Exception as error:  # whatever a user's class does
        return f"{type(error).__name__}: {error}"
    return None if all(torch.equal(a, b) for a, b in pairs) else "its outputs differ"


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from safetensors, or from a torch file with `weights_only=True`.

    Raises:
        DataError: If the file is damaged, holds more than tensors, or does not fit the network.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = read_tensors(path)
        else:  # to the CPU: what was saved on a GPU is read where there is none
            state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        model.load_state_dict(state)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"model.weights {path}: cannot be loaded into the network: {what}") from None


def save_artefact(
    folder: Path, model: nn.Module, factory: Factory | None, memory_format: MemoryFormat = "contiguous"
) -> None:
    """Write a compressed network: `model.safetensors`, then `model.json` with the hash of it.

    Args:
        folder: Where to.
        model: The network.
        factory: What builds its architecture.
        memory_format: In which it was measured to be fastest; it is opened in it.
    """
    write_tensors(folder / "model.safetensors", _state(model))
    data = {
        "format": FORMAT,
        "factory": factory_json(factory),
        "memory_format": memory_format,
        "layers": layers_json(model),
        "weights_sha256": _sha256(folder / "model.safetensors"),
    }
    write_json(folder / "model.json", data)


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The compressed network of an artefact or a run folder, in evaluation mode, ready to run.

    The architecture comes from `model` if it is given (a network of the original architecture; it is not changed),
    else from the factory that the artefact names, which is imported and called: open artefacts as you would run code.
    No pickle is read.

    Args:
        path: A run folder, the folder of an artefact, or its `model.json`.
        model: A network of the original architecture.

    Raises:
        RunFolderError: If the artefact is missing, truncated, damaged or of another version, or does not fit `model`.
    """
    folder = _artefact_folder(Path(path))
    data = read_json(folder / "model.json")
    if data.get("format") != FORMAT:
        found = data.get("format")
        raise RunFolderError(f"{folder / 'model.json'}: expected format {FORMAT}, got {found!r}; save the network anew")
    try:
        layers: dict[str, Any] = data["layers"]
        factory = None if data["factory"] is None else Factory(**data["factory"])
        digest = data["weights_sha256"]
        memory_format: MemoryFormat = data["memory_format"]
    except (KeyError, TypeError, DataError) as error:
        raise RunFolderError(f"{folder / 'model.json'}: damaged: {error}") from None
    tensors = read_tensors(folder / "model.safetensors")
    if _sha256(folder / "model.safetensors") != digest:
        raise RunFolderError(
            f"{folder / 'model.safetensors'}: its contents are not those that model.json was written for"
        )
    if model is None:
        if factory is None:
            raise RunFolderError(
                f"{folder}: the artefact names no factory for its architecture (the network was given as an object); "
                "call load(path, model=...) with a network of the original architecture"
            )
        model = factory.build()
    try:
        compressed = with_layers(model, layers)
        state = compressed.state_dict()
        aliases = {name: tensors[name] if name in tensors else tensors[_alias(compressed, name)] for name in state}
        compressed.load_state_dict({**tensors, **aliases})
    except (SekronError, AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise RunFolderError(f"{folder}: the artefact does not fit the architecture: {error}") from None
    return with_memory_format(compressed.eval(), memory_format)


def layers_json(model: nn.Module) -> dict[str, dict[str, str]]:
    """How every replaced layer of a network is built, as plain data."""
    return {
        name: {
            "structure": str(layer.structure),
            "schedule": str(layer.plan.schedule),
            "execution": layer.execution,
        }
        for name, layer in kronecker_layers(model).items()
    }


def with_layers(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """A copy of the original network with layers as `layers_json` gives them; a state dict is still to be loaded."""
    return replace_layers(
        model, {name: _layer(model, name, spec) for name, spec in layers.items() if not _is_there(model, name, spec)}
    )


def factory_json(factory: Factory | None) -> dict[str, Any] | None:
    """A factory as plain data."""
    return None if factory is None else asdict(factory)


def _artefact_folder(path: Path) -> Path:
    if path.name == "model.json":
        path = path.parent
    if (path / "compressed" / "model.json").exists():
        path = path / "compressed"
    if not (path / "model.json").exists():
        raise RunFolderError(f"{path}: no artefact here (expected model.json and model.safetensors)")
    return path


def _is_there(model: nn.Module, name: str, spec: Mapping[str, Any]) -> bool:
    """Whether the network has the layer already: it was compressed before."""
    layer = model.get_submodule(name)
    return isinstance(layer, KroneckerLayer) and str(layer.structure) == spec["structure"]


def _layer(model: nn.Module, name: str, spec: Mapping[str, Any]) -> KroneckerLayer:
    structure = Structure.parse(spec["structure"])
    schedule = Schedule.parse(spec["schedule"])
    return layer_like(model, name, structure, schedule=schedule, execution=spec["execution"])


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each shared tensor once."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in seen:
            tensors[name] = tensor
            seen.add(key)
    return tensors


def _alias(model: nn.Module, name: str) -> str:
    """The first name in the state dict under which the same tensor is stored."""
    state = model.state_dict()
    return next(other for other, tensor in state.items() if tensor.data_ptr() == state[name].data_ptr())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
