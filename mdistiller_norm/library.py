"""Distillation in a training loop of the user, and loading of trained students."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mdistiller_norm import run
from mdistiller_norm.build import build_distillers
from mdistiller_norm.config import leaves, load_config
from mdistiller_norm.distillers import DISTILLERS, Need
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import Network, build_model
from mdistiller_norm.student import load_student
from mdistiller_norm.types import Batch, Outputs

create_model = build_model


def load(path: str | Path) -> tuple[Network, dict[str, Any]]:
    """Load a trained network from a ``student_*.pt`` file, or from the ``student_best.pt`` of a run folder.

    Return it in eval mode, with its metadata (``name``, ``classes``, ``mean``, ``std``, ``image_size`` ...).
    """
    return load_student(Path(path), with_data=False)[:2]


def train(
    config: str | Path, overrides: Mapping[str, Any] | None = None, resume: bool = False
) -> dict[str, Any]:
    """Train a run from its config file, with ``overrides`` such as ``{"SOLVER.EPOCHS": 2}``.

    With ``resume``, continue from ``latest.pt`` in the run folder, if it exists. Return the content of ``result.json``:
    ``last`` and ``best`` (epoch, top1, top5, loss) and the facts of the run.
    """
    return run.train(load_config(config, _settings(overrides or {}), origin="overrides"), resume)


class Distillation(nn.Module):
    """Student, teacher and methods for a training loop of the user.

    The parameters are those of the student and of the methods. The teacher is frozen, stays in eval mode, moves with
    the module to other devices, and is not part of ``state_dict()``.

    Args:
        method: ``DISTILLER.TYPE``: a name or several, whose losses are summed.
        student: for methods that read logits only, any ``nn.Module`` with parameters (not TorchScript or an exported
            program) from images to logits; otherwise a network of ``create_model`` or a ``Wrapped``.
        teacher: likewise.
        image_size: height and width of the images.
        targets: ``[N]`` int64, class of every training sample; required by CRD.
        keys: of the method's config node, such as ``TEMPERATURE_NORM=2.0`` or ``LOSS={"KD_WEIGHT": 0.5}``; with
            several methods, a dictionary for each name.

    Raises:
        ConfigError: a method, key or value is invalid, or a method does not support the networks.

    Examples:
        >>> kd = Distillation("NormKD", student, teacher, TEMPERATURE_NORM=2.0)
        >>> loss, parts = kd(images, targets, epoch=1)
    """

    def __init__(
        self,
        method: str | Sequence[str],
        student: nn.Module,
        teacher: nn.Module,
        *,
        image_size: tuple[int, int] = (32, 32),
        targets: Tensor | None = None,
        **keys: Any,
    ) -> None:
        super().__init__()
        names = [method] if isinstance(method, str) else list(method)
        own = _settings({method: keys} if isinstance(method, str) else keys)
        own += [f"DISTILLER.TYPE={json.dumps(names)}", "EXPERIMENT.NAME=library"]
        node = load_config(None, own, origin="arguments").node
        networks = [
            module if isinstance(module, Network) else _LogitNetwork(module, image_size)
            for module in (student, teacher)
        ]
        for name in names:
            cls = DISTILLERS[name]
            if cls.need > Need.LOGITS and any(
                isinstance(each, _LogitNetwork) for each in networks
            ):
                raise ConfigError(f"{name} requires features: use create_model or models.Wrapped")
            if cls.needs_indices and targets is None:
                raise ConfigError(
                    f"{name} requires the classes of the training set: pass targets"
                )
        known = torch.empty(0) if targets is None else targets
        distillers = build_distillers(node, networks[0], networks[1], known, image_size)
        self.trainable = Trainable(networks[0], distillers)
        frozen = networks[1].eval().requires_grad_(False)
        if any(each.teacher_in_train_mode for each in distillers.values()):
            frozen = copy.deepcopy(frozen).train()
        self._teacher = [frozen]  # a list: no submodule
        self._epoch, self._weights = 0, torch.empty(0)
        step = torch.zeros((), dtype=torch.int64, device=next(student.parameters()).device)
        self._step = nn.Buffer(step, persistent=False)

    def forward(
        self, images: Tensor, targets: Tensor, epoch: int = 1, indices: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the training loss of a batch.

        Args:
            images: ``[B, 3, H, W]``, normalised.
            targets: ``[B]``, int64 class indices.
            epoch: counted from 1; the warm-up of the methods depends on it.
            indices: ``[B]``, int64 positions of the samples in the training set; required by CRD.

        Returns:
            The loss to differentiate, and its detached parts by name (``ce`` and the methods), with their weights and
            warm-up applied.
        """
        methods, device = self.trainable.methods, images.device
        if indices is None and any(method.needs_indices for method in methods):
            raise ConfigError(f"{' and '.join(self.trainable.distillers)} requires indices")
        self._begin_epoch(epoch, device)
        unknown = targets.new_full(targets.shape, -1)
        indices = unknown if indices is None else indices
        batch = Batch(images, targets, indices, unknown, self._step.clone())
        self._step.add_(1)
        enabled = torch.is_autocast_enabled(device.type)
        self.trainable.autocast = torch.get_autocast_dtype(device.type) if enabled else None
        with torch.no_grad():
            outputs = self._teacher[0].outputs(images)
        total, parts, _ = self.trainable(batch, outputs, self._weights)
        return total, dict(zip(self.trainable.loss_names, parts.detach(), strict=True))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin_epoch(self, epoch: int, device: torch.device) -> None:
        if (epoch, device) != (self._epoch, self._weights.device):
            self._epoch = epoch
            self._weights = torch.tensor(self.trainable.loss_weights(epoch), device=device)
            for method in self.trainable.methods:
                method.begin_epoch(epoch, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._teacher[0]._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn)  # type: ignore[no-untyped-call]
        return self


class _LogitNetwork(Network):
    def __init__(self, module: nn.Module, image_size: tuple[int, int]) -> None:
        parameter = next(module.parameters(), None)
        if parameter is None or isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(f"{type(module).__name__} has no parameters or is TorchScript")
        with torch.no_grad():
            logits = copy.deepcopy(module).eval()(parameter.new_zeros(1, 3, *image_size))
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ConfigError(f"{type(module).__name__} must return logits [B, C]")
        super().__init__(logits.shape[1])
        self.module = module

    def outputs(self, images: Tensor) -> Outputs:
        # The module may not run on the meta device, where methods read the shapes.
        shape = len(images), self.num_classes
        logits = images.new_empty(shape) if images.is_meta else self.module(images)
        return Outputs(logits, (), (), logits.new_empty(len(logits), 0))


def _settings(values: Mapping[str, Any]) -> list[str]:
    """Return config keys and values, which may be dictionaries of nested keys, as ``KEY=VALUE``."""
    encode = json.JSONEncoder(default=lambda value: value.tolist()).encode
    return [
        f"{key}={value if isinstance(value, str) else encode(value)}"
        for key, value in leaves(values)
    ]
