"""Adapter that turns any image classifier into a :class:`Network`, with forward hooks that record its maps."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models.base import Network
from mdistiller_norm.registry import nearest
from mdistiller_norm.types import Outputs


class Wrapped(Network):
    """Network around a module such as torchvision's or timm's.

    Example: ``Wrapped(resnet18(num_classes=10), 10, classifier="fc", features=("relu", "layer1", "layer2"))``. The
    module and the names in its state dict are unchanged, so published weights load strictly. ``preacts`` are empty
    because hooks do not see the maps before an activation; a subclass can override :meth:`outputs` and
    :meth:`norms_before_relu` to provide them.

    Args:
        module: returns logits ``[B, C]``, or an object with them as ``logits``.
        num_classes: number of classes C.
        classifier: name of the submodule whose input is ``pooled``: ``[B, D]``, or a map to average over its pixels.
        features: names of the submodules whose outputs are ``features``, maps ``[B, D_i, H_i, W_i]``: the stem, then
            the end of every stage, shallow to deep. For a submodule called several times the last call counts.

    Raises:
        ConfigError: the module has no submodule of this name.
    """

    def __init__(
        self,
        module: nn.Module,
        num_classes: int,
        *,
        classifier: str,
        features: Sequence[str] = (),
    ) -> None:
        super().__init__(num_classes)
        names = [name for name, _ in module.named_modules() if name]
        for name in (classifier, *features):
            if name not in names:
                near = " or ".join(nearest(name, names) or dict(module.named_children()))
                kind = type(module).__name__
                raise ConfigError(f"{kind} has no submodule {name!r}: did you mean {near}?")
        self.module, self._classifier, self._features = module, classifier, tuple(features)
        self.register_load_state_dict_pre_hook(_add_module_prefix)  # type: ignore[no-untyped-call]
        vars(module)["_load_from_state_dict"] = partial(_load_versioned, module)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def outputs(self, images: Tensor) -> Outputs:
        if not isinstance(images, Tensor):
            raise TypeError("symbolic tracing skips the hooks that record the maps")
        names = [*self._features, self._classifier]
        seen: dict[str, Any] = dict.fromkeys(names, (None, None))  # input and output

        def keep(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen[name] = args[0] if args else None, output

        # Hooks for this pass only: permanent ones would be shared by copies of the network.
        modules = {name: self.module.get_submodule(name) for name in names}
        handles = [m.register_forward_hook(partial(keep, name)) for name, m in modules.items()]
        try:
            result, found = self.run_module(images)
        finally:
            for handle in handles:
                handle.remove()
        logits = self._check("its output", getattr(result, "logits", result), 2)
        if (count := logits.shape[1]) != self.num_classes:
            raise ConfigError(f"{self.name} gives {count} logits for {self.num_classes} classes")
        maps = [(f"the output of {name!r}", seen[name][1]) for name in self._features]
        maps += [(f"map {number}", value) for number, value in enumerate(found)]
        features = tuple(self._check(name, value, 4) for name, value in maps)
        name = self._classifier
        pooled = self._check(f"the input of {name!r}", seen[name][0], 2, 4)
        return Outputs(logits, features, (), pooled if pooled.dim() == 2 else pooled.mean((2, 3)))

    def run_module(self, images: Tensor) -> tuple[Any, Sequence[Tensor]]:
        """Return the module's output, and maps ``[B, D_i, H_i, W_i]`` that follow those of the submodules."""
        return self.module(images), ()

    def _check(self, name: str, value: object, *dimensions: int) -> Tensor:
        if isinstance(value, Tensor) and value.dim() in dimensions:
            return value
        required = " or ".join({2: "[B, D]", 4: "[B, D, H, W]"}[count] for count in dimensions)
        got = (
            "no call of this submodule" if value is None else getattr(value, "shape", type(value))
        )
        raise ConfigError(f"{self.name}: {name} must be a tensor {required}, got {got}")


def _add_module_prefix(
    network: nn.Module, state: dict[str, Any], prefix: str, *rest: object
) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}module.{name.removeprefix(prefix)}"] = state.pop(name)


def _load_versioned(module: Any, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
    # torchvision's MNASNet requires its version, which is not stored under the changed names.
    metadata = {"version": module._version} | metadata
    type(module)._load_from_state_dict(module, state, prefix, metadata, *rest)
