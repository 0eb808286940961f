"""Grey levels for pictures on a page."""

import numpy as np


def to_display(image: np.ndarray, levels: tuple[int, int]) -> np.ndarray:
    """Return uint8 or uint16 [H, W] as uint8, so that the two levels become 0 and 255."""
    low, high = levels
    scaled = (image.astype(np.float32) - low) * (255 / max(high - low, 1))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
