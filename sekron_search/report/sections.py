"""What the report says, section by section, for Markdown and for the page alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sekron_search.report.document import Code, Column, Items, Picture, Section, Table
from sekron_search.report.verdict import UNITS, shown


def latency_section(report: Mapping[str, Any]) -> Section | None:
    """How latency was measured or predicted; None where it was not budgeted."""
    facts = report["latency"]
    if facts is None:
        return None
    foreign = facts["predicted_for"]
    threads = f"{facts['num_threads']} thread" + ("s" if facts["num_threads"] > 1 else "")
    whole = "measured" if foreign is None else "by the whole network's operations"
    rows = [
        (f"calibration {i}", f"{row['summed_saving']:.1%}", f"{row['measured_saving']:.1%} ± {row['noise']:.1%}")
        for i, row in enumerate(facts["calibration"], start=1)
    ]
    rows += [
        (
            f"candidate {i}, as predicted",
            f"{1 - row['predicted']:.1%}",
            f"{1 - row['measured']:.1%} ± {row['noise']:.1%}",
        )
        for i, row in enumerate(facts["candidates"], start=1)
    ]
    how = "Measured" if foreign is None else f"Predicted by the profile of another machine ({foreign}), not measured,"
    formats = f"memory format {facts['memory_format']} (the original: {facts['original_memory_format']})"
    text = (
        f"{how} in {facts['runtime']} ({facts['version']}), {threads}, {formats}, on networks as they "
        "are deployed: plain modules, batch-norms folded. Unless the budget allows for a slower network, options that "
        "are not faster than the layer they replace, beyond the noise, were left out. A millisecond that layers save "
        f"one by one saves {facts['scale']:.2f} ms in the network, by the networks below, each beside the original; "
        "predictions allow for that."
    )
    columns = Column("network", "text"), Column("saved, by the sum of its layers"), Column(f"saved, {whole}")
    return Section("Latency", (text, Table(columns, tuple(rows))))


def sorted_front(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The candidates of the front, the least divergent first."""
    return sorted(report["front"], key=lambda candidate: float(candidate["objectives"]["divergence"]))


def front_section(report: Mapping[str, Any]) -> Section:
    """The Pareto front as plots and a table."""
    front = sorted_front(report)
    costs = [name for name in UNITS if front and name in front[0]["objectives"]]
    rows = tuple(
        (
            str(candidate["trial"]),
            f"{candidate['objectives']['divergence']:.4g}",
            *(shown(name, candidate["objectives"][name]) for name in costs),
            "yes" if candidate["feasible"] else "no",
            candidate["source"],
        )
        for candidate in front
    )
    columns = [Column("trial"), Column("divergence"), *map(Column, costs)]
    columns += [Column("within budget", "text"), Column("from", "text")]
    head = (
        f"{report['num_trials']} trials of {report['num_distinct_networks']} distinct networks; "
        f"divergence ({report['divergence_name']}) of the outputs from the original's, "
        "before any training; costs as predicted."
    )
    pictures = (Picture(f"front_{b['name']}", f"Pareto front: front_{b['name']}") for b in report["budgets"])
    chosen = next((i for i, candidate in enumerate(front) if candidate["chosen"]), None)
    return Section("Pareto front", (head, *pictures, Table(tuple(columns), rows, chosen)))


def layers_section(report: Mapping[str, Any]) -> Section:
    """Every layer, and those that were left alone."""
    rows = tuple(
        (
            layer["name"],
            structure_of(layer),
            _share(layer, "flops"),
            _share(layer, "params"),
            time_of(layer),
            f"{layer['error']:.3f}",
            layer["reason"],
        )
        for layer in report["layers"]
    )
    columns = [Column("layer", "text"), Column("structure", "code"), *map(Column, ("flops", "params", "time"))]
    columns += [Column("output error"), Column("why", "text")]
    picture = Picture("layers", "Layer by layer")
    return Section("Layers", (picture, Table(tuple(columns), rows), *left_alone(report)))


def left_alone(report: Mapping[str, Any]) -> tuple[str | Items, ...]:
    """The layers that were no part of the search, and why; nothing if all were."""
    if not report["left_alone"]:
        return ()
    texts = tuple(f"{skipped['name']} ({skipped['type']}): {skipped['reason']}" for skipped in report["left_alone"])
    return "Left alone:", Items(texts)


def structure_of(layer: Mapping[str, Any]) -> str:
    """The structure's text form, and whether it is run as a dense layer."""
    if layer["family"] == "dense":
        return "dense"
    return f"{layer['structure']}{', rebuilt at load' if layer['execution'] == 'dense' else ''}"


def time_of(layer: Mapping[str, Any]) -> str:
    """The latency of a layer, and its share of the original's."""
    after = layer["after"]
    if after["latency_ms"] is None:
        return "not measured"
    share = after["latency_ms"] / layer["before"]["latency_ms"]
    return f"{after['latency_ms']:.3f} ± {after['latency_noise_ms']:.3f} ms, {share:.2f}x"


def _share(layer: Mapping[str, Any], cost: str) -> str:
    return f"{layer['after'][cost] / layer['before'][cost]:.2f}x"


def candidates_section(report: Mapping[str, Any]) -> Section:
    """The candidates that were fitted and measured."""
    costs = [budget["name"] for budget in report["budgets"]]
    rows = tuple(
        (
            f"candidates/{row['folder']}",
            str(row["trial"]),
            f"{row['divergence']:.4g}",
            f"{row['divergence_before_sequential_fit']:.4g}",
            *(shown(name, row["costs"][name]) for name in costs),
            "" if row["metric"] is None else f"{row['metric']:.4f}",
        )
        for row in report["candidates"]
    )
    columns = [Column("folder", "code"), Column("trial"), Column("divergence")]
    columns += [Column("before the fit layer after layer"), *map(Column, costs), Column("validation")]
    chosen = next((i for i, row in enumerate(report["candidates"]) if row["chosen"]), None)
    text = "The best trials, fitted layer after layer and measured, before training."
    return Section("Candidates", (text, Table(tuple(columns), rows, chosen)))


def training_section(report: Mapping[str, Any]) -> Section | None:
    """The chosen candidate's curve and its learning rate; None if nothing was trained."""
    if not report["curve"]:
        return None
    rows = tuple((f"{row['epoch']:.0f}", f"{row['loss']:.4f}", f"{row['metric']:.4f}") for row in report["curve"])
    table = Table(tuple(map(Column, ("epoch", "loss", "validation"))), rows)
    return Section("Fine-tuning", (Picture("finetuning", "Fine-tuning"), *_learning_rate(report), table))


def _learning_rate(report: Mapping[str, Any]) -> tuple[str, ...]:
    found = report["learning_rate"]
    if found is None:
        return ()
    losses = ", ".join(
        f"{'infinite' if loss is None else format(loss, '.4g')} at {rate:.2g}" for rate, loss in found["trials"]
    )
    return (f"Learning rate {found['learning_rate']:.2g}, found by short trainings; their losses: {losses}.",)


def exports_section(exports: Sequence[Mapping[str, Any]]) -> Section | None:
    """What was exported, and how the files compare with the networks; None if nothing was."""
    if not exports:
        return None
    blocks: list[str | Table] = []
    for record in exports:
        sizes = " and ".join(map(str, record["batch_sizes"]))
        blocks.append(
            f"{record['file']}: {record['num_bytes']:,} bytes; opened again, its outputs are within "
            f"{record['rel_difference']:.1e} of the network's (relative to the largest), with batches of {sizes}."
        )
        if record["networks"]:
            blocks.append(_exported_networks(record))
    return Section("Exports", tuple(blocks))


def _exported_networks(record: Mapping[str, Any]) -> Table:
    """The exported networks side by side, as their runtime runs them."""
    rows = tuple(
        (
            f"{network['name']}, {network['precision']}",
            "" if network["metric"] is None else f"{network['metric']:.4f}",
            f"{network['num_bytes']:,}",
            f"{network['latency_ms']:.3f} ± {network['latency_noise_ms']:.3f}",
        )
        for network in record["networks"]
    )
    columns = [Column(f"in {record['runtime']}", "text"), Column(record["metric_name"]), Column("bytes")]
    return Table((*columns, Column(f"latency, ms per batch of {record['latency_batch_size']}")), rows)


def provenance_section(report: Mapping[str, Any]) -> Section:
    """What the run ran on."""
    facts = report["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    items = (
        f"{facts['processor']}, {facts['machine']}, {facts['device']}, {facts['num_threads']} threads, "
        f"{facts['runtime']}",
        f"Python {facts['python']}; {packages}",
        f"seed {facts['seed']}, started {facts['date']}",
    )
    return Section("How this was made", (Items(items),))


def use_section(report: Mapping[str, Any]) -> Section:
    """How to open, export and make the network again."""
    if report["environment"]["factory"] is None:
        load = "# model: the network that was compressed, or another of its architecture\n"
        load += 'network = sekron_search.load("RUN", model=model)'
    else:
        load = 'network = sekron_search.load("RUN")'
    commands = (
        "sekron-search export RUN --format onnx         # for other programs; also pt2, safetensors, and --int8\n"
        "sekron-search select RUN --budget flops=0.5x   # another budget, without another search\n"
        "sekron-search run RUN/config.yaml --out OTHER  # the same run again\n"
        "sekron-search report RUN                       # this report again"
    )
    return Section(
        "How to load, export and reproduce it",
        (
            "RUN is the folder that this report lies in.",
            Code(f"import sekron_search\n\n{load}", "python"),
            Code(commands, "bash"),
            "config.yaml holds every setting, and the seed. Where the run was started from Python, by compress, "
            "network and data are not among them: call compress again with these settings, and "
            "sekron_search.export_network on the network.",
        ),
    )
