"""Handwritten digits, a data set that scikit-learn includes."""

from __future__ import annotations

import numpy as np
import torch

from mdistiller_norm.data.memory import Split, TensorDataset


def digits() -> TensorDataset:
    """Return 1,797 grey 8x8 images, enlarged to 32x32 RGB and split 1,437 / 360, stratified by class.

    Images are not flipped: digits are not mirror-symmetric.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998).
    """
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it
    from sklearn.model_selection import train_test_split

    source = load_digits()
    pixels = np.round(source.images * (255 / 16)).astype(np.uint8)  # values are 0..16
    pixels = pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3)
    parts = train_test_split(
        pixels, source.target.astype(np.int64), test_size=360, stratify=source.target, random_state=0
    )
    train_x, test_x, train_y, test_y = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    return TensorDataset(
        name="digits",
        train=Split(train_x, train_y),
        test=Split(test_x, test_y),
        classes=tuple(str(digit) for digit in range(10)),
        mean=(0.3054,) * 3,
        std=(0.3760,) * 3,
        padding=4,
        flip=False,
    )
