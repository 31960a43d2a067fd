"""A configuration from a file, from options, or from both: one schema checks them all."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from sekron_search.cli.arguments import BudgetOption, UsageError, budget_of
from sekron_search.errors import ConfigError

if TYPE_CHECKING:
    from sekron_search.config import Config

#: Keys whose values are paths; those in options are relative to the working directory, not to the file.
PATH_KEYS = ("space", "model.weights", "data.path", "latency.profile", "tables", "out")

#: Keys of the section `data` that say where it comes from.
DATA_KEYS = ("source", "path", "factory", "kwargs")


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the command line says about a configuration; every option is also an option of the command.

    Args:
        config: The file, if any.
        model, weights, data, budget, epochs, seed, device, set: The options; they win over the file.
    """

    config: Annotated[
        Path | None, typer.Argument(help="YAML file that describes model, data and budget.", metavar="CONFIG")
    ] = None
    model: Annotated[
        str | None,
        typer.Option(help="Function that returns the network: package.module:function.", metavar="REFERENCE"),
    ] = None
    weights: Annotated[
        Path | None, typer.Option(help="Its weights: safetensors, or a torch file with a state dict.", metavar="FILE")
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of images, a folder per class; or a function that returns a DataBundle, "
            "package.module:function; or digits. Images keep their size; where sizes differ say which one all get, "
            "with --set data.image_size=[224,224]. They are fed in RGB, normalised by ImageNet's mean and deviation "
            "unless --set data.mean=[0.5] and --set data.std=[0.5] say otherwise (one number: in grey).",
            metavar="DIR",
        ),
    ] = None
    budget: BudgetOption = ()  # type: ignore[assignment]  # typer makes a list of it
    epochs: Annotated[int | None, typer.Option(min=0, help="Of fine-tuning; short for finetune.epochs.")] = None
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything that is random.")] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None
    set: Annotated[
        list[str],
        typer.Option(
            help="Any key of a configuration and its value as YAML, such as search.trials=20 or "
            "space.families=[sekron,cp]; may be repeated.",
            metavar="KEY=VALUE",
        ),
    ] = ()  # type: ignore[assignment]

    def load(self, *, fallback: Path | None = None, any_budget: bool = False) -> Config:
        """The configuration.

        Args:
            fallback: A file that counts where the command line names none.
            any_budget: Whether the command needs no budget.

        Raises:
            UsageError: If an option is wrong, names it, or one is missing.
            ConfigError: If the file is wrong.
        """
        options = self._options()  # before the imports, which take seconds: slips are told at once
        from sekron_search.config import Config
        from sekron_search.files import read_yaml
        from sekron_search.search.space import SearchSpace

        file = self.config or fallback
        where = "command line" if file is None else f"config {file}"
        base = Path.cwd() if file is None else file.parent
        data = {} if file is None else read_yaml(file, where)
        if isinstance(data.get("space"), str):
            data["space"] = SearchSpace.load(base / data["space"]).model_dump()
        if self.data is not None and isinstance(data.get("data"), dict):
            # What the file says of the place of its own data says nothing of another one.
            data["data"] = {key: value for key, value in data["data"].items() if key not in DATA_KEYS}
        for option, key, value in options:
            _put(data, key, value, option)
        if any_budget:
            data.setdefault("budget", {"flops": "1x"})
        if file is None and (missing := [name for name in ("model", "data", "budget") if name not in data]):
            raise UsageError(f"give a CONFIG, or --model, --data and --budget; --{', --'.join(missing)} is missing")
        try:
            return Config.of(data, where, base)
        except ConfigError as error:
            text = str(error)
            wrong = [option for option, key, _ in options if _is_about(text, key)]
            if not wrong:
                raise
            raise UsageError(f"{', '.join(wrong)}: {text.removeprefix(f'{where}: ')}") from None

    def _options(self) -> list[tuple[str, str, Any]]:
        """(option as given, dotted key, value) of everything that is given, in the order in which it counts."""
        found: list[tuple[str, str, Any]] = []
        if self.model is not None:
            found.append((f"--model {self.model}", "model.factory", self.model))
        if self.weights is not None:
            found.append((f"--weights {self.weights}", "model.weights", str(_absolute(self.weights))))
        if self.data is not None:
            found += [(f"--data {self.data}", f"data.{key}", value) for key, value in _data(self.data).items()]
        if self.budget:
            found.append((" ".join(f"--budget {b}" for b in self.budget), "budget", budget_of(list(self.budget))))
        for option, key in (("epochs", "finetune.epochs"), ("seed", "seed"), ("device", "device")):
            if (value := getattr(self, option)) is not None:
                found.append((f"--{option} {value}", key, value))
        return found + [_parsed(text) for text in self.set]


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose first parameter is a `Given`, with the options of one in its place."""

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        own = {name: values.pop(name) for name in names}
        command(Given(**own), **values)

    hints = get_type_hints(Given, include_extras=True)
    names = [field.name for field in fields(Given)]
    given = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(Given)
    ]
    kinds = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kinds[parameter.name])
        for parameter in list(inspect.signature(command).parameters.values())[1:]
    ]
    wrapper.__signature__ = inspect.Signature([*given, *own])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in (*given, *own)}
    return wrapper


def _data(text: str) -> dict[str, str]:
    """What `--data` means, as keys of the section `data`."""
    if text == "digits":
        return {"source": "digits"}
    if ":" in text and not Path(text).exists():
        from sekron_search.references import REFERENCE

        if re.fullmatch(REFERENCE, text) is None:
            raise UsageError(f"--data {text}: neither a folder that is there nor a function, package.module:function")
        return {"source": "factory", "factory": text}
    return {"source": "folder", "path": str(_absolute(Path(text)))}


def _parsed(text: str) -> tuple[str, str, Any]:
    """A `--set` option: (as given, key, value)."""
    import yaml

    option = f"--set {text}"
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UsageError(f"{option}: expected KEY=VALUE with a dotted key, such as search.trials=20")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"{option}: the value is not YAML: {' '.join(str(error).split())}") from None
    if key in PATH_KEYS and isinstance(parsed, str):
        parsed = str(_absolute(Path(parsed)))
    return option, key, parsed


def _put(data: dict[Any, Any], key: str, value: Any, option: str) -> None:
    """Set a dotted key, its sections made where they are missing."""
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UsageError(f"{option}: '{'.'.join(sections[: depth + 1])}' is no section of keys, but {data!r:.80}")
    data[last] = value


def _is_about(message: str, key: str) -> bool:
    """Whether an error names a key, one below it, or a section that holds it."""
    named = [f"{name}." for name in re.findall(r"key '([\w.]+)'", message)]
    return any(name.startswith(f"{key}.") or f"{key}.".startswith(name) for name in named)


def _absolute(path: Path) -> Path:
    return Path.cwd() / path.expanduser()
