"""Distillation with the Trainer of Hugging Face (pip install transformers accelerate)."""

from transformers import Trainer, TrainingArguments

import mdistiller_norm as mdn


class DistillationTrainer(Trainer):
    """Trainer of a ``Distillation`` on items with ``pixel_values`` and ``labels``."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """Return the loss of a batch, and its parts if requested."""
        epoch = int(self.state.epoch or 0) + 1
        loss, parts = model(inputs["pixel_values"], inputs["labels"], epoch=epoch)
        return (loss, parts) if return_outputs else loss


def distill(student, teacher, dataset, folder, **options):
    """Train the student; the options are those of ``TrainingArguments``."""
    kd = mdn.Distillation("NormKD", student, teacher, TEMPERATURE_NORM=2.0)
    arguments = TrainingArguments(folder, remove_unused_columns=False, **options)
    DistillationTrainer(kd, arguments, train_dataset=dataset).train()
