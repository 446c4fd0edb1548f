"""A distillation method: regression of the logits."""

from mdistiller_norm import distillers


@distillers.register("MSE")  # DISTILLER.TYPE, and the name of the config node
class MSE(distillers.Distiller):
    """Mean squared difference of the logits."""

    defaults = {"LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 0.5}}  # the node's keys and defaults
    need = distillers.Need.LOGITS  # POOLED to read pooled features, MAPS to read feature maps

    @classmethod
    def from_config(cls, node, pair):  # pair: the shapes of both networks' outputs
        return cls(ce_weight=node.LOSS.CE_WEIGHT, weight=node.LOSS.KD_WEIGHT)

    def forward(self, student, teacher, batch):
        return (student.logits - teacher.logits).square().mean()
