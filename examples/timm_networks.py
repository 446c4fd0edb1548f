"""A network of timm."""

import timm

from mdistiller_norm import models


@models.register("convnext_atto")
def convnext_atto(num_classes):
    """ConvNeXt (atto) with ImageNet weights."""
    network = timm.create_model("convnext_atto", pretrained=True, num_classes=num_classes)
    stages = ("stem", "stages.0", "stages.1", "stages.2", "stages.3")  # network.feature_info lists most
    return models.Wrapped(network, num_classes, classifier=network.default_cfg["classifier"], features=stages)
