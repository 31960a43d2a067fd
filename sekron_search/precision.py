"""Where passes are computed, and in what precision while a network is trained."""

from __future__ import annotations

from typing import Any, Literal

import torch

Autocast = Literal["auto", "bfloat16", "float16"]


def device_name(name: str) -> str:
    """The name of a device, which need not be there; a `ValueError` if it is none."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError("expected a torch device such as 'cpu', 'cuda' or 'cuda:1'") from None
    if kind not in ("cpu", "cuda"):
        raise ValueError("expected 'cpu' or 'cuda'")
    return name


def known_device(name: str) -> str:
    """The name of a device that is there; a `ValueError` if it is none."""
    if not is_there(torch.device(device_name(name))):
        raise ValueError("torch sees no CUDA device here; use 'cpu'")
    return name


def is_there(device: torch.device) -> bool:
    """Whether torch can use a device."""
    return device.type != "cuda" or torch.cuda.is_available()


def autocast_dtype(asked: Autocast | None, device: torch.device) -> torch.dtype | None:
    """What autocast computes in on a device; None is float32 throughout.

    Args:
        asked: "auto" is bfloat16 where the device computes in it: one that converts is slower than in float32, on CPUs
            by up to ten times.
        device: Where the network is.
    """
    if asked == "auto":
        return torch.bfloat16 if computes_in_bfloat16(device) else None
    return None if asked is None else {"bfloat16": torch.bfloat16, "float16": torch.float16}[asked]


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16, not by converting to float32 and back."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch do not tell
    return any(has is True for name, has in capabilities.items() if "bf16" in name)
