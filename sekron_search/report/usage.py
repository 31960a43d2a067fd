"""The report's section on how to go on: opening the network, exporting it, other networks, the same again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sekron_search.report.document import Block, Code, Section

TITLE = "How to load, export and reproduce it"


def from_config(report: Mapping[str, Any]) -> bool:
    """Whether network and data are described by the run's config.yaml, so that commands can make them again."""
    # Earlier reports do not say; a network without a factory was surely given as an object.
    return bool(report.get("from_config", report["environment"]["factory"] is not None))


def finish_command(report: Mapping[str, Any]) -> str | None:
    """The command that finishes another trial, but for its number; None where commands cannot make the network."""
    if not from_config(report):
        return None
    return f"sekron-search finish {'RUN' if report.get('finishes') is None else 'SOURCE'} --trial"


def use_section(report: Mapping[str, Any]) -> Section:
    """How to open, export and make the network again."""
    load = 'network = sekron_search.load("RUN")'
    if report["environment"]["factory"] is None:
        load = (
            "# model: the network that was compressed, or another of its architecture\n"
            'network = sekron_search.load("RUN", model=model)'
        )
    blocks: list[Block] = [
        "RUN is the folder that this report lies in.",
        Code(f"import sekron_search\n\n{load}", "python"),
    ]
    if not from_config(report):
        return Section(TITLE, (*blocks, *_by_python(report.get("finishes"))))
    return Section(
        TITLE, (*blocks, *(_of_run() if report.get("finishes") is None else _of_finished(report["finishes"])))
    )


def _by_python(origin: Mapping[str, Any] | None) -> tuple[Block, ...]:
    """What works where only a program knows network and data; of a run that has searched, or one that finished that."""
    searched = "RUN" if origin is None else "SOURCE"
    whole = (
        "To make the same run again call compress with the settings in config.yaml, which has all of them, and the "
        "seed; its section calibration is the argument calibration_settings. With resume=True and out=RUN the call "
        "goes on with this run, or gives its result at once, which finishes other networks of the search:"
        if origin is None
        else f"SOURCE is the folder of the run that has searched, {origin['run']}. The call that made it, with "
        "resume=True, gives its result, which finishes other networks of its search:"
    )
    export = 'sekron_search.export_network(network, example_inputs, "network.onnx", format="onnx")  # or pt2'
    return (
        Code(export, "python"),
        _commands(
            ("select RUN --budget flops=0.5x --print-only", "what another budget would give, as structures"),
            ("show RUN --trial N", "a network of the front, layer by layer"),
            ("report RUN", "this report again"),
        ),
        "Network and data were given to compress as objects, which no file describes: the commands export, finish, and "
        f"select without --print-only need a run that was started from a config file. {whole}",
        Code(
            f"result = sekron_search.compress(model, ..., out={searched}, resume=True)\n"
            "other = result.finish(trial=N)  # of the front\n"
            'other = result.finish(budget={"flops": "0.4x"})  # another budget, without another search',
            "python",
        ),
    )


def _of_run() -> tuple[Block, ...]:
    return (
        _commands(
            ("export RUN --format onnx", "for other programs; also pt2, safetensors, and --int8"),
            ("show RUN", "the networks of the front, by trial"),
            ("finish RUN --trial N", "another of them, fitted, trained and reported; no new search"),
            ("select RUN --budget flops=0.5x", "another budget, without another search"),
            ("run RUN/config.yaml --out OTHER", "the same run again"),
            ("report RUN", "this report again"),
        ),
        "config.yaml holds every setting, and the seed.",
    )


def _of_finished(origin: Mapping[str, Any]) -> tuple[Block, ...]:
    kind, _, name = origin["source"].partition(" ")
    return (
        _commands(
            ("export RUN --format onnx", "for other programs; also pt2, safetensors, and --int8"),
            (f"finish SOURCE --{kind} {name} --out OTHER", "the same network again"),
            ("finish SOURCE --trial N", "another one of that search; `show SOURCE` lists them"),
            ("select SOURCE --budget flops=0.5x", "another budget, without another search"),
            ("report RUN", "this report again"),
        ),
        f"SOURCE is the folder of the run that has searched, {origin['run']}. config.yaml holds its settings: `run` "
        "with them would search anew.",
    )


def _commands(*lines: Sequence[str]) -> Code:
    """Commands and what each does, comments below one another."""
    width = max(len(command) for command, _ in lines)
    return Code("\n".join(f"sekron-search {command:<{width}}  # {what}" for command, what in lines), "bash")
