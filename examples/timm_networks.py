"""A network of timm with options; without options, its name is enough: DISTILLER.STUDENT timm:convnext_atto."""

import timm

from mdistiller_norm import models


@models.register("vit_patch4")
def vit_patch4(num_classes):
    """ViT (tiny) for 32 pixels, with patches of 4 pixels and six blocks."""
    sizes = {"img_size": 32, "patch_size": 4, "depth": 6}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **sizes)
    return models.Wrapped(network, num_classes, classifier="head")  # tokens: no maps
