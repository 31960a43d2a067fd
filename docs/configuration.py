"""Writes docs/configuration.md, every key of a configuration, from the docstrings: `python docs/configuration.py`."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sekron_search.config import Config, Settings

PAGE = Path(__file__).with_suffix(".md")

INTRODUCTION = """# The configuration

Every key of a run's YAML file. On the command line a key is `--set finetune.epochs=10`. `sekron_search.compress` takes
sections as dictionaries, `finetune={"epochs": 10}`, and other keys as arguments; it is given network and data
themselves, and the section `calibration` is `calibration_settings` there. What the keys are for: [guide](guide.md). An
unknown key, or a value that cannot be, ends a run before it begins. This page is written by `python
docs/configuration.py`.
"""


def described(section: type[BaseModel]) -> dict[str, str]:
    """What the docstring says of every key, its own and those of what it is made from."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        text = inspect.cleandoc(kind.__doc__ or "") if issubclass(kind, BaseModel) else ""
        _, _, args = text.partition("\nArgs:\n")
        for names, told in re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", args, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), re.sub(r"\s+", " ", told))
    return found


def default_of(field: FieldInfo) -> str:
    """As it would be written in YAML; nothing where there is none to write."""
    if field.is_required():
        return "has to be given"
    value: Any = field.default
    return "" if value is None else f"`{json.dumps(value).strip(chr(34))}`"


def table(section: type[BaseModel], names: list[str]) -> Iterator[str]:
    """The lines of a table of some keys."""
    told = described(section)
    yield "| key | by default | what it is |"
    yield "| --- | --- | --- |"
    for name in names:
        text = told[name].replace("|", "\\|")
        yield f"| `{name}` | {default_of(section.model_fields[name])} | {text} |"


def page() -> str:
    """The whole page."""
    sections = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    order = ["model", "data", *(name for name in Settings.model_fields if name in sections)]
    lines = [INTRODUCTION, "## The run", ""]
    lines += table(Config, [name for name in Config.model_fields if name not in sections])
    for name in order:
        summary = inspect.cleandoc(sections[name].__doc__ or "").split("\n\n")[0].replace("\n", " ")
        told = f" {described(Config)[name]}" if name in described(Config) else ""
        lines += ["", f"## `{name}`", "", f"{summary}{told}", ""]
        lines += table(sections[name], list(sections[name].model_fields))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
