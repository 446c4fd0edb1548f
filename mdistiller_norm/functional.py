"""Pure loss functions for other training loops: scalars in at least float32, averaged over the batch, unweighted."""

from mdistiller_norm.distillers.at import at_loss
from mdistiller_norm.distillers.crd import nce_loss
from mdistiller_norm.distillers.ctkd import ctkd_loss
from mdistiller_norm.distillers.dist import dist_loss
from mdistiller_norm.distillers.dkd import dkd_loss
from mdistiller_norm.distillers.dtkd import dtkd_loss
from mdistiller_norm.distillers.fitnet import hint_loss
from mdistiller_norm.distillers.kd import kd_loss
from mdistiller_norm.distillers.kdsvd import kdsvd_loss
from mdistiller_norm.distillers.logit_standardization import lsdkd_loss, lskd_loss
from mdistiller_norm.distillers.nkd import nkd_loss
from mdistiller_norm.distillers.normkd import norm_dkd_loss, normkd_loss
from mdistiller_norm.distillers.nst import nst_loss
from mdistiller_norm.distillers.ofd import feat_loss
from mdistiller_norm.distillers.pkt import pkt_loss
from mdistiller_norm.distillers.reviewkd import hcl_loss
from mdistiller_norm.distillers.rkd import rkd_loss
from mdistiller_norm.distillers.rld import rld_loss
from mdistiller_norm.distillers.sp import sp_loss
from mdistiller_norm.distillers.ttm import ttm_loss, wttm_loss
from mdistiller_norm.distillers.vid import vid_loss

__all__ = [
    "at_loss", "ctkd_loss", "dist_loss", "dkd_loss", "dtkd_loss", "feat_loss", "hcl_loss", "hint_loss", "kd_loss",
    "kdsvd_loss", "lsdkd_loss", "lskd_loss", "nce_loss", "nkd_loss", "norm_dkd_loss", "normkd_loss", "nst_loss",
    "pkt_loss", "rkd_loss", "rld_loss", "sp_loss", "ttm_loss", "vid_loss", "wttm_loss",
]  # fmt: skip
