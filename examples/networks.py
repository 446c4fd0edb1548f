"""Networks of torchvision as teacher and student."""

from torch import nn
from torchvision.models import ResNet34_Weights, mobilenet_v3_small, resnet34

from mdistiller_norm import models


@models.register("pretrained34")  # for DISTILLER.TEACHER and DISTILLER.STUDENT
def pretrained34(num_classes):
    """ResNet34 with ImageNet weights and a new classifier."""
    network = resnet34(weights=ResNet34_Weights.IMAGENET1K_V1)
    network.fc = nn.Linear(network.fc.in_features, num_classes)
    # features: submodules that output maps, the stem first; the input of classifier is the pooled feature
    stages = ("relu", "layer1", "layer2", "layer3", "layer4")
    return models.Wrapped(network, num_classes, classifier="fc", features=stages)


@models.register("mobile")
def mobile(num_classes):
    """MobileNetV3 (small)."""
    stages = ("features.0", "features.1", "features.3", "features.8", "features.12")
    network = mobilenet_v3_small(num_classes=num_classes)
    return models.Wrapped(network, num_classes, classifier="classifier", features=stages)
