"""Networks of timm, torchvision and the Hugging Face Hub, built by name."""

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller_norm.errors import ConfigError, first_line, needs_extra
from mdistiller_norm.models.base import Network
from mdistiller_norm.models.wrapped import Wrapped
from mdistiller_norm.registry import nearest

PREFIXES = ("timm:", "torchvision:", "hf-hub:", "local-dir:")
Size = tuple[int, ...] | None


def has_weights(name: str) -> bool:
    """Return whether a name selects pretrained weights: a repository, or a tag after a dot (``timm:NAME.TAG``)."""
    prefix, _, rest = name.partition(":")
    return name.startswith(PREFIXES) and ("." in rest or prefix in ("hf-hub", "local-dir"))


def build_external(name: str, num_classes: int, image_size: Size, pretrained: bool) -> Network:
    """Build a network of a library; the classifier of weights for another number of classes is initialised anew.

    Arguments and errors are those of :func:`~mdistiller_norm.models.build_model`.
    """
    prefix, _, rest = name.partition(":")
    try:
        if prefix == "torchvision":
            return _build_torchvision(rest, num_classes, image_size, pretrained)
        with needs_extra("timm", f"model {name!r}"):
            return _build_timm(
                rest if prefix == "timm" else name, num_classes, image_size, pretrained
            )
    except ConfigError:
        raise
    except Exception as error:  # the libraries raise any type, also for failed downloads
        kind = type(error).__name__
        raise ConfigError(
            f"model {name!r} cannot be built ({kind}: {first_line(error)})"
        ) from error


def _unknown(name: str, known: Iterable[str]) -> ConfigError:
    near = " or ".join(nearest(name, known))
    return ConfigError(f"unknown model {name!r}" + (f": did you mean {near}?" if near else ""))


class _TimmNetwork(Wrapped):
    def run_module(self, images: Tensor) -> tuple[Any, Sequence[Tensor]]:
        module: Any = self.module
        final, maps = module.forward_intermediates(images)
        # Without a stem, which the methods expect before the stages.
        if module.feature_info[0]["reduction"] > 2:
            maps = [maps[0], *maps]
        return module.forward_head(final), maps


def _build_timm(name: str, num_classes: int, image_size: Size, pretrained: bool) -> Network:
    import timm

    is_known = timm.is_model_pretrained if "." in name else timm.is_model
    if ":" not in name and not is_known(name):
        known = timm.list_models() + timm.list_pretrained()
        raise _unknown(f"timm:{name}", [f"timm:{each}" for each in known])
    create = partial(timm.create_model, name, pretrained=pretrained, num_classes=num_classes)
    module: Any = create()
    cfg = module.pretrained_cfg
    if image_size and cfg.get("fixed_input_size") and tuple(cfg["input_size"][1:]) != image_size:
        module = create(img_size=image_size)
    head = module.get_classifier()
    head = head[0] if isinstance(head, tuple) else head  # a distilled network has two
    classifier = next((name for name, child in module.named_modules() if child is head), "")
    kind = _TimmNetwork if hasattr(module, "forward_intermediates") else Wrapped
    network = kind(module, num_classes, classifier=classifier)
    keys = ("num_classes", "mean", "std", "interpolation")
    network.pretrained = {key: cfg[key] for key in keys} | {"image_size": cfg["input_size"][1:]}
    return network


def _build_torchvision(
    name: str, num_classes: int, image_size: Size, pretrained: bool
) -> Network:
    from torchvision import models

    architecture, _, tag = name.partition(".")
    known = models.list_models(module=models)
    if architecture.lower() not in known:
        raise _unknown(f"torchvision:{name}", [f"torchvision:{each}" for each in known])
    tags = models.get_model_weights(architecture).__members__
    if tag and tag not in tags:
        known = [f"torchvision:{architecture}.{each}" for each in tags]
        raise _unknown(f"torchvision:{name}", known)
    options: dict[str, Any] = {"num_classes": num_classes}
    weights = models.get_model_weights(architecture)[tag or "DEFAULT"] if pretrained else None
    images = expected_images(weights) if weights else {"image_size": [224]}
    if architecture.startswith("vit_"):
        options["image_size"] = (image_size or images["image_size"])[0]
    # Their weights expect another normalisation.
    if architecture in ("googlenet", "inception_v3"):
        options["transform_input"] = pretrained or bool(tag)
    module = models.get_model(architecture, weights=None, **options)
    *_, classifier = (
        key for key, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    )
    network = Wrapped(
        module, num_classes, classifier=classifier, features=_stages(module, classifier)
    )
    if weights:
        state: Any = weights.get_state_dict(check_hash=True)
        if "image_size" in options:
            embeddings = models.vision_transformer.interpolate_embeddings
            state = embeddings(options["image_size"], module.patch_size, state)
        for key, own in module.state_dict().items():
            if own.shape[:1] == (num_classes,) and own.shape != state[key].shape:
                state[key] = own  # a classifier, or an auxiliary one
        module.load_state_dict(state)
        network.pretrained = {"num_classes": len(weights.meta["categories"]), **images}
    return network


def expected_images(weights: Any) -> dict[str, Any]:
    """Return size, normalisation and interpolation of the images that weights of torchvision expect."""
    images = weights.transforms()
    return {
        "mean": images.mean,
        "std": images.std,
        "image_size": images.crop_size * 2,
        "interpolation": images.interpolation.value,
    }


def _stages(module: nn.Module, classifier: str) -> tuple[str, ...]:
    """Return the last submodule with maps of each size, from the stem on; none if all maps have one size."""
    shadow = copy.deepcopy(module).to("meta").eval()
    ends: dict[int, str] = {}

    def keep(name: str, module: nn.Module, args: object, output: Any) -> None:
        shape = tuple(getattr(output, "shape", ()))
        if len(shape) == 4 and shape[2] == shape[3] > 1:
            ends[shape[2]] = name

    for name, child in shadow.named_modules():
        parent = shadow.get_submodule(name.rpartition(".")[0])
        is_end = parent is shadow or isinstance(parent, nn.Sequential | nn.ModuleList)
        # Deeper ones, and those of other parents, are inside of blocks.
        if is_end and name.count(".") < 2 and name.split(".")[0] != classifier.split(".")[0]:
            child.register_forward_hook(partial(keep, name))
    try:
        with torch.no_grad():
            shadow(torch.empty(1, 3, 224, 224, device="meta"))
    except Exception:  # a network for another size
        return ()
    names = tuple(ends.values()) if len(ends) > 1 else ()
    # Without a stem, as in _TimmNetwork.
    return names if max(ends, default=0) > 56 else names[:1] + names
