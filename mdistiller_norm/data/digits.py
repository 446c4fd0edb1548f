"""Handwritten digits, the data set that the package includes.

``digits.npz`` holds the images and targets of scikit-learn's ``load_digits``, a copy of the test set of UCI's "Optical
Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998), and the indices of a stratified split.
"""

from pathlib import Path

import numpy as np
import torch

from mdistiller_norm.data.memory import Split, TensorDataset


def digits() -> TensorDataset:
    """Return 1,797 grey 8x8 images, enlarged to 32x32 RGB and split 1,437 / 360, stratified by class."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        source = {key: torch.from_numpy(array) for key, array in file.items()}
    pixels = (source["images"].double() * (255 / 16)).round().byte()
    pixels = pixels.repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None].repeat(1, 1, 1, 3)
    whole = Split(pixels, source["targets"].long())
    train, test = whole[source["train"].long()], whole[source["test"].long()]
    mean, std = (0.3054,) * 3, (0.3760,) * 3
    # Not flipped: digits are not mirror-symmetric.
    return TensorDataset("digits", train, test, tuple("0123456789"), mean, std, flip=False)
