"""The report's section on the audit of the proxies: how well each ranked networks that were trained afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sekron_search.report.document import Column, Picture, Section, Table

#: What the search minimises.
SEARCHED = "divergence"

#: Shares of pairs under the same budget that are named right, and what may be made of a proxy that reaches them.
VERDICTS = (
    (0.85, "Its order can be trusted, but for networks that are nearly alike."),
    (0.7, "It tells good networks from bad ones, but not which of the good ones is best: train several candidates."),
    (0.0, "Under one budget it says little: train several candidates, and choose by their metrics."),
)


def audit_section(audit: Mapping[str, Any] | None) -> Section | None:
    """What the audit found; None if there was none.

    Args:
        audit: The record that `sekron_search.audit` makes.
    """
    if audit is None:
        return None
    proxies = {proxy["name"]: proxy for proxy in audit["proxies"]}
    searched, best = proxies[SEARCHED], best_cheap(audit)
    epochs = f"{audit['epochs']} epoch" + ("s" if audit["epochs"] > 1 else "")
    verdict = next(text for share, text in VERDICTS if _share(searched["mean_within"]) >= share)
    return Section(
        "How far to trust the proxies",
        (
            f"{len(audit['candidates'])} random networks were ranked by every proxy, then trained for {epochs} "
            f"({audit['train_seconds']:.0f} s each) and ranked by {audit['metric_name']} on the validation split. "
            f"Budgets: {'; '.join(searched['within'])}.",
            f"Of two of these networks, the divergence that the search minimises names the better one in "
            f"{_share(searched['tau']):.0%} of the cases; of two under the same budget in "
            f"{_share(searched['mean_within']):.0%}. {verdict} The best proxy that looks at errors and needs neither "
            f"labels nor a fit of the whole network is: {best['label']}, right in {_share(best['tau']):.0%} and "
            f"{_share(best['mean_within']):.0%} of the cases.",
            Picture("audit", f"{best['label']} against {audit['metric_name']}"),
            _table(audit),
            "tau is Kendall's: 1 if both rankings agree on every pair, 0 if on as many as chance. Over all budgets it "
            "is easier to be right than within one.",
        ),
    )


def _table(audit: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            proxy["label"],
            f"{proxy['tau']:.2f}",
            f"{proxy['low']:.2f} to {proxy['high']:.2f}",
            ", ".join(f"{tau:.2f}" for tau in proxy["within"].values()),
            f"{proxy['seconds']:.3g}",
        )
        for proxy in audit["proxies"]
    )
    titles = "tau", "95 % interval", "within budgets", "s per network"
    return Table((Column("proxy", "text"), *map(Column, titles)), rows)


def best_cheap(audit: Mapping[str, Any]) -> dict[str, Any]:
    """The proxy of the largest tau among those that look at errors and need neither labels nor a fit of the network."""
    cheap: list[dict[str, Any]] = [proxy for proxy in audit["proxies"] if proxy["cheap"]]
    return max(cheap, key=lambda proxy: float(proxy["tau"]))


def _share(tau: float) -> float:
    """Of the pairs, where none is tied, that a ranking of this tau has in the right order."""
    return (1 + tau) / 2
