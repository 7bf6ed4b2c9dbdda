"""PNG files (ISO/IEC 15948) with nothing but zlib."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_COLOUR_TYPE = {1: 0, 3: 2, 4: 6}  # channels -> grey, RGB, RGBA


def encode(pixels: np.ndarray) -> bytes:
    """A PNG file of 8 bits per channel.

    Args:
        pixels: uint8, (H, W) grey, or (H, W, C) with C = 1, 3 (RGB) or 4 (RGBA); H, W >= 1.

    Raises:
        TypeError: the pixels are not uint8.
        ValueError: another shape.
    """
    if pixels.dtype != np.uint8:
        raise TypeError(f"png: pixels must be uint8, got {pixels.dtype}")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in _COLOUR_TYPE or pixels.size == 0:
        raise ValueError(f"png: pixels must have shape (H, W) or (H, W, 1, 3 or 4), got {pixels.shape}")
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPE[channels], 0, 0, 0)
    # each row begins with its filter: 0, the bytes as they are
    rows = np.zeros((height, 1 + width * channels), np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    data = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
