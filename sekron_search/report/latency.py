"""The report's section on latency: the device profile and its noise, sums over layers beside whole networks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sekron_search.costs.profile import DeviceProfile
from sekron_search.report.document import Column, Section, Table


def profile_facts(profile: DeviceProfile) -> dict[str, Any]:
    """What a device profile holds and how sure it is, as plain data.

    Returns:
        `options` of layers and `operations` that were measured; `rel_noise`, the median over both of the noise relative
        to the latency, None if nothing was measured; `errors` of the latency model, cross-validated, None if there is
        no model.
    """
    measured = [*profile.layers.values(), *profile.operations.values()]
    return {
        "options": len(profile.layers),
        "operations": len(profile.operations),
        "rel_noise": statistics.median(m.noise_ms / m.median_ms for m in measured) if measured else None,
        "errors": None if profile.fitted is None else asdict(profile.fitted.errors["all"]),
    }


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
        "are not faster than the layer they replace, beyond the noise, were left out; those that may be stayed only if "
        "the budgets could not be met without them. A millisecond that layers save "
        f"one by one saves {facts['scale']:.2f} ms in the network, by the networks below, each beside the original; "
        "predictions allow for that."
    )
    columns = Column("network", "text"), Column("saved, by the sum of its layers"), Column(f"saved, {whole}")
    return Section("Latency", (text, *_profile(facts), Table(columns, tuple(rows))))


def _profile(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What the predictions rest on; nothing in reports that do not know."""
    known = facts.get("profile")
    if known is None:
        return ()
    text = (
        f"The device profile holds {known['options']:,} options of layers and {known['operations']:,} operations, as "
        "measured"
    )
    if known["rel_noise"] is not None:
        text += f"; their noise is {known['rel_noise']:.1%} of the latency in the median"
    errors = known["errors"]
    if facts["predicted_for"] is not None and errors is not None:
        text += (
            f". Everything else is predicted by its latency model, whose error for operations that a fit was not shown "
            f"is {errors['median']:.1%} in the median, and below {errors['p90']:.1%} for nine of ten (cross-validated "
            f"on {errors['operations']:,} operations)"
        )
    return (f"{text}.",)
