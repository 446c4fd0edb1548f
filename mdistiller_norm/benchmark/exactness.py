"""What the fast forms of a teacher change: its logits, against the network as it was loaded, and then the losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mdistiller_norm.benchmark.timing import Record
from mdistiller_norm.benchmark.workload import Ours
from mdistiller_norm.engine.compile import compiler_missing
from mdistiller_norm.engine.teacher_cache import CachedTeacher
from mdistiller_norm.errors import ConfigError

# The first is what the losses of the others are compared with.
FORMS = {
    "live": ("ENGINE.COMPILE=none",),
    "compiled": ("ENGINE.COMPILE=teacher",),
    "cached fp32": ("ENGINE.COMPILE=none", "DISTILLER.TEACHER_CACHE=lazy"),
    "cached fp16": (
        "ENGINE.COMPILE=none", "DISTILLER.TEACHER_CACHE=lazy", "DISTILLER.TEACHER_CACHE_PRECISION=fp16",
    ),
}  # fmt: skip


def _losses(ours: Ours, steps: int) -> tuple[list[float], float, float]:
    """The total loss of each step; the largest difference of a logit from the plain network's; their spread."""
    step, losses, largest, spread = ours.step, [], 0.0, 0.0
    if step.teacher is None:
        raise ConfigError("--exactness is about a teacher, and DISTILLER.TYPE is NONE: choose --methods")
    network = step.teacher.network
    for _ in range(steps):
        before = step.meters.sums.clone()
        raw = ours.next_batch()
        lesson = next(step.lessons(*raw))
        assert lesson.taught is not None
        with torch.inference_mode():
            plain = network(lesson.batch.images)
        largest = max(largest, float((lesson.taught.logits - plain).abs().max()))
        spread = float(plain.std(1).mean())
        step(*raw)
        losses.append(float((step.meters.sums - before).sum()) / len(raw[0]))
    return losses, largest, spread


def exactness(build: Callable[[str, Sequence[str]], Ours], device: torch.device, steps: int) -> Record:
    """Train a few steps with each form of the teacher, from the same weights and on the same batches.

    Args:
        build: a run, from a name and overrides.
        device: it trains on.
        steps: of each.

    Returns:
        For each form ``logits``, the largest absolute difference of a logit from those of the network as it was loaded
        (float32, nothing folded), ``loss``, the largest relative difference of a step's loss from the live teacher's,
        and ``logits_std``, the mean standard deviation of a sample's logits. A form that there is not on this machine,
        or for this method, is left out.

    Raises:
        ConfigError: there is no teacher.
    """
    found: Record = {}
    reference: list[float] = []
    for name, overrides in FORMS.items():
        if name == "compiled" and compiler_missing(device):
            continue
        ours = build(name.replace(" ", "_"), overrides)
        if name.startswith("cached") and not isinstance(ours.step.teacher, CachedTeacher):
            continue  # the method reads maps, which are not kept
        losses, largest, spread = _losses(ours, steps)
        reference = reference or losses
        changed = max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))
        found[name] = {"logits": largest, "loss": changed, "logits_std": spread}
    return found
