"""A data set in memory: the digits 3, 5 and 8 (pip install scikit-learn)."""

import torch
from sklearn.datasets import load_digits

from mdistiller_norm import data


@data.register("three_digits")  # DATASET.TYPE
def three_digits(root, options):
    """Return the data set; ``root`` is DATASET.ROOT, ``options`` holds the other DATASET keys."""
    source = load_digits(n_class=10)
    wanted = torch.tensor([3, 5, 8])
    labels, pixels = torch.from_numpy(source.target), torch.from_numpy(source.images)
    selected = torch.isin(labels, wanted)
    grey = (pixels[selected] * (255 / 16)).round().to(torch.uint8)
    # [N, 8, 8] -> [N, 32, 32, 3]
    images = grey.repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None].repeat(1, 1, 1, 3)
    targets = torch.searchsorted(wanted, labels[selected])  # 0, 1, 2, int64
    return data.TensorDataset(
        name="three_digits",  # the name in weights and results
        train=data.Split(images[100:], targets[100:]),
        test=data.Split(images[:100], targets[:100]),
        classes=("3", "5", "8"),
        mean=(0.3,) * 3,  # of pixels in [0, 1]
        std=(0.37,) * 3,
        padding=4,  # random crops of the image with 4 black pixels around it
        flip=False,  # no mirror images of digits
    )
