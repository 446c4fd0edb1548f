"""Every loss as a pure function, for people with a training loop of their own.

Scalars out, means over the batch, no cross entropy and no method weight inside.
"""

from mdistiller_norm.distillers.at import at_loss
from mdistiller_norm.distillers.crd import nce_loss
from mdistiller_norm.distillers.dkd import dkd_loss
from mdistiller_norm.distillers.fitnet import hint_loss
from mdistiller_norm.distillers.kd import kd_loss
from mdistiller_norm.distillers.logit_standardization import lsdkd_loss, lskd_loss
from mdistiller_norm.distillers.normkd import normkd_loss
from mdistiller_norm.distillers.normkd_w_dkd import norm_dkd_loss
from mdistiller_norm.distillers.ofd import feat_loss
from mdistiller_norm.distillers.reviewkd import hcl_loss
from mdistiller_norm.distillers.rkd import rkd_loss

__all__ = [
    "at_loss",
    "dkd_loss",
    "feat_loss",
    "hcl_loss",
    "hint_loss",
    "kd_loss",
    "lsdkd_loss",
    "lskd_loss",
    "nce_loss",
    "norm_dkd_loss",
    "normkd_loss",
    "rkd_loss",
]
