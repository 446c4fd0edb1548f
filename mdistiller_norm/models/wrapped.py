"""Any image classifier as a :class:`Network`: its maps are read by forward hooks, its weights keep their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models.base import Network
from mdistiller_norm.registry import nearest
from mdistiller_norm.types import Outputs


class Wrapped(Network):
    """A module of somebody else's, torchvision's or timm's, behind the contract of a network.

    For example ``Wrapped(resnet18(num_classes=10), 10, classifier="fc", features=("relu", "layer1", "layer2"))``. The
    module stays as it is, and so do the names in its state dict: its published weights load strictly. ``preacts`` are
    empty, since hooks see what a stage gives and not what came before its activation; a subclass that knows better
    overrides :meth:`outputs` and :meth:`norms_before_relu`.

    Args:
        module: from images to logits ``[B, C]``, or to something whose ``logits`` they are.
        num_classes: number of classes C.
        classifier: name of the submodule whose input is ``pooled``, ``[B, D]``; of a map the mean over its pixels.
        features: names of the submodules whose outputs are ``features``, maps ``[B, D_i, H_i, W_i]``: the stem, then
            the end of every stage, shallow to deep. Of one that is called several times the last call counts.

    Raises:
        ConfigError: the module has no submodule of such a name.
    """

    def __init__(self, module: nn.Module, num_classes: int, *, classifier: str, features: Sequence[str] = ()) -> None:
        super().__init__(num_classes)
        names = [name for name, _ in module.named_modules() if name]
        for name in (classifier, *features):
            if name not in names:
                near = nearest(name, names) or [name for name, _ in module.named_children()]
                raise ConfigError(f"{_kind(module)} has no submodule {name!r}: did you mean {' or '.join(near)}?")
        self.module = module
        self._classifier, self._features = classifier, tuple(features)
        self.register_load_state_dict_pre_hook(_load_inside)  # type: ignore[no-untyped-call]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, under its own names."""
        return self.module.state_dict(*args, **kwargs)

    def outputs(self, images: Tensor) -> Outputs:
        """See :class:`Network`.

        Raises:
            ConfigError: what the module gives is not what was said of it.
        """
        if not isinstance(images, Tensor):
            raise TypeError("tracing passes over the hooks that read the maps")
        given: dict[str, Tensor] = {}
        taken: list[Tensor] = []

        def keep(name: str) -> Any:
            return lambda module, args, output: given.update({name: output})

        def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            taken[:] = args[:1]

        # Hooks of this pass alone: none is left behind for copies of the network to share, or for others to trip over.
        handles = [self.module.get_submodule(name).register_forward_hook(keep(name)) for name in self._features]
        handles.append(self.module.get_submodule(self._classifier).register_forward_pre_hook(take))
        try:
            result = self.module(images)
        finally:
            for handle in handles:
                handle.remove()
        logits = self._check("what it gives", getattr(result, "logits", result), 2)
        if logits.shape[1] != self.num_classes:
            raise ConfigError(f"{self.name} gives {logits.shape[1]} logits for {self.num_classes} classes")
        maps = tuple(self._check(f"the output of {name!r}", given.get(name), 4) for name in self._features)
        pooled = self._check(f"the input of {self._classifier!r}", taken[0] if taken else None, 2, 4)
        return Outputs(logits, maps, (), pooled if pooled.dim() == 2 else pooled.mean((2, 3)))

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d | None, ...]:
        """See :class:`Network`: none, as there are no ``preacts``."""
        return ()

    def _check(self, what: str, found: object, *dimensions: int) -> Tensor:
        """Refuse what is not a tensor of one of these numbers of dimensions."""
        if isinstance(found, Tensor) and found.dim() in dimensions:
            return found
        wanted = " or ".join({2: "[B, D]", 4: "[B, D, H, W]"}[count] for count in dimensions)
        got = f"of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        got = "missing: it was not called" if found is None else got
        raise ConfigError(f"{self.name} ({_kind(self.module)}): {what} must be a tensor {wanted}, but is {got}")


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _load_inside(network: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    """Turn the module's own names into those that loading looks for."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}module.{name.removeprefix(prefix)}"] = state.pop(name)
