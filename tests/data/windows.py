"""NumPy truth about crops."""

import numpy as np


def windows_of(image, padding, flip, size=None):
    """All windows of the reflected image, and their mirror images."""
    height, width = size or image.shape[:2]
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    windows = [
        padded[top : top + height, left : left + width]
        for top in range(padded.shape[0] - height + 1)
        for left in range(padded.shape[1] - width + 1)
    ]
    return windows + [window[:, ::-1] for window in windows] if flip else windows
