"""How fast a training step is, what it costs, and how that compares with a reference's own loop.

A measurement is a number of *rounds*. In each, every contestant runs a block of steps, and the order is reversed from
round to round; ratios are taken within a round. So a machine that gets slower or faster meanwhile moves the times,
and hardly the ratios. A time is that of a whole block with the device waited for at its end, divided by its steps.

:func:`~mdistiller_norm.benchmark.report.run` returns, and ``tools/benchmark.py --json FILE`` writes::

    {
      "command": the command line,
      "machine": versions, commit, device, threads; "matmul_gflops": best of 10 square matrix products,
      "data": "real ..." or "synthetic ...",
      "pair": {"teacher", "student", "teacher_weights", "batch_size"},
      "overrides": config keys changed on the command line,
      "blocks": rounds, "steps": of a block, "warmup": untimed steps before, "replay": every block has the same batches,
      "table9": {METHOD: {
        "ms": SPREAD of the time of a step,
        "ratio_to_kd": SPREAD, over the rounds (only when KD is among the methods),
        "memory_mb": {"peak", "growth"}: of a process of its own that trains a few steps. CPU: its resident memory, and
            how much of that came after imports and data (null where there is no /proc); CUDA: both are
            max_memory_allocated,
        "extra_parameters": that the method adds (CRD: with its memory),
        "gflop": of a step (student forward and backward, method, one teacher forward; 2 for a multiply-add),
        "share_of_matmul": gflop / time / matmul_gflops,
        "parts_ms": {"data", "teacher", "student", "loss", "backward", "optimizer": SPREAD}, eagerly one after another,
            waited for each; null with DOT or fp16,
        "log": what the run said about itself,
        "paper": {"ms", "ratio_to_kd", "extra_parameters"}: Table 9 of the NormKD paper, one RTX 3080 Ti; may be null
      }},
      "against": {METHOD: {"ours_ms", "reference_ms": SPREAD, "ratio": SPREAD of reference / ours, "log"}},
      "evaluate": {"images", "ours", "reference": SPREAD of images/s, "ratio": SPREAD of ours / reference},
      "exactness": {FORM of the teacher: {"logits": largest absolute difference of a logit from the network's as it was
        loaded, "logits_std": of a sample's logits, "loss": largest relative difference of a step's loss from the live
        teacher's}},
      "loader": {"folder", "images", "workers", "ours", "usual": images/s of the best of ``blocks`` passes, "ratio"}
    }

with only what was asked for, and SPREAD = ``{"median", "q1", "q3", "n", "values"}``.
"""

from mdistiller_norm.benchmark.report import Settings, run, show

__all__ = ["Settings", "run", "show"]
