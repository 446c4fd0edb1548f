"""Effect of a compiled or cached teacher on its logits and the losses; ``pytest -s`` prints the figures."""

from pathlib import Path

import torch
from short_runs import config

from mdistiller_norm.engine.compile import compiler_missing
from mdistiller_norm.run import build_run

CACHED = "DISTILLER.TEACHER_CACHE=lazy"
FORMS = {
    "live": ["ENGINE.COMPILE=none"],
    "compiled": ["ENGINE.COMPILE=teacher"],
    "cached fp32": ["ENGINE.COMPILE=none", CACHED],
    "cached fp16": ["ENGINE.COMPILE=none", CACHED, "DISTILLER.TEACHER_CACHE_PRECISION=fp16"],
}


def measure(folder: Path, name: str, *overrides: str) -> tuple[list[float], float, float]:
    """Return the losses of an epoch, the largest difference of a logit, and the mean std of a sample's logits."""
    trainer = build_run(config(folder, name, "DISTILLER.TYPE=NormKD", *overrides)).trainer
    trainer.log.close()
    step, losses, largest, std = trainer.step, [], 0.0, 0.0
    step.begin_epoch(1, 0)
    for raw in step.with_teacher_outputs(step.loader.batches(1)):
        split = len(raw) - step.teacher.extra
        batch = step.loader.prepare(*raw[:split])
        with torch.inference_mode():
            plain = step.teacher.network(batch.images)
            largest = max(largest, float((step.teacher(batch, *raw[split:]).logits - plain).abs().max()))
        std = float(plain.std(1).mean())
        before = step.meters.sums.clone()
        step(*raw)
        losses.append(float((step.meters.sums - before).sum()))
    return losses, largest, std


def test_logits_and_losses_of_each_form_of_a_teacher(tmp_path: Path, teacher: str) -> None:
    live: list[float] = []
    for name, overrides in FORMS.items():
        if name == "compiled" and compiler_missing(torch.device("cpu")):
            continue
        losses, logit, std = measure(tmp_path, name.replace(" ", "_"), teacher, *overrides)
        live = live or losses
        loss = max(abs(a - b) / abs(b) for a, b in zip(losses, live, strict=True))
        print(
            f"{name:12} largest difference of a logit {logit:.2e} ({logit / std:.1e} of its std), of a loss {loss:.1e}"
        )
        rounding = 1e-2 if name == "cached fp16" else 1e-4
        assert logit < rounding * std
        assert loss < rounding
        assert (logit > 1e-4 * std) == (name == "cached fp16"), "half precision rounds more than folding does"
