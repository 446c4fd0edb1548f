"""Distillation with Lightning (pip install lightning)."""

import lightning
import torch

import mdistiller_norm as mdn


class Distilled(lightning.LightningModule):
    """Student that NormKD trains; checkpoints contain the student, not the teacher."""

    def __init__(self, student, teacher):
        super().__init__()
        self.kd = mdn.Distillation("NormKD", student, teacher, TEMPERATURE_NORM=2.0)

    def training_step(self, batch, batch_idx):
        """Return the loss of a batch of images and targets."""
        images, targets = batch
        loss, parts = self.kd(images, targets, epoch=self.current_epoch + 1)
        self.log_dict(parts)
        return loss

    def configure_optimizers(self):
        """Return the optimizer of the student and the method's modules."""
        return torch.optim.SGD(self.kd.parameters(), lr=0.05, momentum=0.9)


def distill(student, teacher, loader, **options):
    """Train the student; the options are those of ``lightning.Trainer``."""
    lightning.Trainer(**options).fit(Distilled(student, teacher), loader)
