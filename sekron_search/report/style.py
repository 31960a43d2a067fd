"""What static plots and the page have in common: colours, and how costs are called along an axis."""

from __future__ import annotations

# Okabe and Ito's colours, told apart by colour-blind readers; markers repeat what colours say.
BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#E69F00", "#009E73", "#999999", "#000000"

#: Bars of what was before.
PALE = "#DDDDDD"

LABELS = {
    "flops": "multiply-adds per sample",
    "params": "parameters",
    "latency_ms": "latency, ms per batch (predicted)",
    "peak_activation_bytes": "peak activations, bytes (predicted)",
}
