"""Named random streams: no global seeds, and a resumed run draws what the unbroken run would have drawn."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, name: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on (seed, name, step) and on nothing else.

    A part that is switched off draws nothing from the others' streams, and step ``n`` needs no replay of the steps
    before it.

    Args:
        seed: the run's seed, any integer.
        name: what the numbers are for, such as ``"pixels/init"``.
        step: which draw of that name.
        device: where the numbers are made.

    Returns:
        A ``torch.Generator`` on ``device``.
    """
    digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=8).digest()
    # 63 bits: manual_seed takes a signed 64-bit integer
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)
