"""Measuring a device: the designed operations, the granularity of channels, what every operation costs besides."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from sekron_search.costs.anchored import node_overhead
from sekron_search.costs.design import design, granularity_sweep
from sekron_search.costs.measure import Latency
from sekron_search.costs.operations import Convolution, Elementwise, Operation
from sekron_search.costs.profile import DeviceProfile
from sekron_search.costs.sampling import measure_operations
from sekron_search.progress import Reporter
from sekron_search.runtimes.base import Runtime

#: Multiples of channels that are tried.
GRANULARITIES = (1, 2, 4, 8, 16, 32)

#: A coarser granularity has to explain the sweep so much better.
BETTER = 0.8

#: The profile is saved after so many seconds of measuring.
SAVE_EVERY_S = 5.0


def measure_device(
    profile: DeviceProfile,
    runtime: Runtime,
    reporter: Reporter,
    save: Callable[[], None],
    *,
    seed: int = 0,
    quick: bool = False,
    known_granularity: int | None = None,
) -> None:
    """Measure what the profile lacks of the design, and fit its latency model.

    Args:
        profile: To be completed.
        runtime: That of the profile.
        reporter: Told of the progress.
        save: Called every few seconds, when interrupted, and at the end.
        seed, quick: Of the design.
        known_granularity: Where it was measured before.
    """
    wanted = [*design(seed, quick=quick), *granularity_sweep()]
    missing = [o for o in profile.costly(wanted) if o not in profile.operations]
    if not missing and profile.fitted is not None:
        return
    saved = time.monotonic()
    with reporter.task("measuring operations", len(missing)) as task:
        done = 0

        def keep(found: dict[Operation, Latency]) -> None:
            nonlocal done, saved
            profile.operations.update({o: latency for o, latency in found.items() if latency.median_ms > 0})
            done += len(found)
            task.update(done)
            if time.monotonic() - saved > SAVE_EVERY_S:
                save()
                saved = time.monotonic()

        try:
            measure_operations(missing, runtime, after_chunk=keep)
        except KeyboardInterrupt:
            save()
            raise
    reporter.say("fitting the latency model")
    profile.fit(known_granularity or granularity(profile), node_overhead(runtime))
    save()


def granularity(profile: DeviceProfile) -> int:
    """The multiple of channels that best explains the steps of the sweep, from what was measured of it."""
    sweep = [o for o in granularity_sweep() if o in profile.operations]
    channels = np.array([o.in_channels for o in sweep if isinstance(o, Convolution)])
    times = np.array([profile.operations[o].median_ms for o in sweep])
    best, least = GRANULARITIES[0], np.inf
    for size in GRANULARITIES:
        full = np.ceil(channels / size) * size
        columns = np.column_stack([np.ones(len(full)), full, full**2]) / times[:, None]
        left = columns @ np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)[0] - 1
        error = float(np.sum(left**2))
        if error < BETTER * least:
            best, least = size, error
    return best


def granularity_of(runtime: Runtime) -> int:
    """The multiple of channels at which a runtime's time steps here, measured in some seconds."""
    profile = DeviceProfile.empty(runtime)
    measure_operations(granularity_sweep(), runtime, after_chunk=profile.operations.update)
    return granularity(profile)


def with_merged(profile: DeviceProfile, other: DeviceProfile, reporter: Reporter) -> DeviceProfile:
    """The profile with another one merged into it; conflicts are said."""
    merged, conflicts = profile.merge(other)
    for conflict in conflicts[:10]:
        reporter.say(f"differs beyond noise, the newer counts: {conflict}")
    if len(conflicts) > 10:
        reporter.say(f"... and {len(conflicts) - 10} more")
    return merged


def summary_rows(profile: DeviceProfile) -> list[tuple[str, str]]:
    """What there is to say of a profile that was measured to the end."""
    model, fitted = profile.model, profile.fitted
    assert fitted is not None
    rows = []
    for name, error in fitted.errors.items():
        text = f"median {error.median:.1%}, mean {error.mean:.1%}, 90 % below {error.p90:.1%}"
        rows.append((f"error, {name} ({error.operations})", f"{text}, Spearman {error.spearman:.3f}"))
    rows.append(("channel granularity", str(fitted.granularity)))
    reference = [o for o in profile.operations if isinstance(o, Elementwise) and o.inputs == 1]
    kind = "elementwise" if reference else "pointwise"
    call, *_, read, written, _, _ = model.roofline_weights(kind)
    rows.append(("overhead of an operation", f"{1e3 * (call + fitted.node_ms):.1f} us"))
    if read + written > 0:
        rows.append(("memory bandwidth", f"{2 * 4 / (read + written):.1f} GB/s"))
    return rows
