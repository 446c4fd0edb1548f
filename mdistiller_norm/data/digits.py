"""Handwritten digits, the data set that the package includes.

``digits.npz`` holds the images and targets of scikit-learn's ``load_digits``, a copy of the test set of UCI's "Optical
Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998), and the indices of a stratified split.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mdistiller_norm.data.memory import Split, TensorDataset


def digits() -> TensorDataset:
    """Return 1,797 grey 8x8 images, enlarged to 32x32 RGB and split 1,437 / 360, stratified by class.

    Images are not flipped: digits are not mirror-symmetric.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        source = dict(file)
    pixels = np.round(source["images"] * (255 / 16)).astype(np.uint8)  # values are 0..16
    pixels = pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3)
    images, targets = torch.from_numpy(pixels), torch.from_numpy(source["targets"].astype(np.int64))
    train, test = (torch.from_numpy(source[part].astype(np.int64)) for part in ("train", "test"))
    return TensorDataset(
        name="digits",
        train=Split(images[train], targets[train]),
        test=Split(images[test], targets[test]),
        classes=tuple(str(digit) for digit in range(10)),
        mean=(0.3054,) * 3,
        std=(0.3760,) * 3,
        padding=4,
        flip=False,
    )
