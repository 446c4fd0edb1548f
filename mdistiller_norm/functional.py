"""Pure loss functions for use in other training loops.

Each returns a scalar in at least float32, averaged over the batch, without the cross entropy and the method's weight.
"""

from mdistiller_norm.distillers.at import at_loss as at_loss
from mdistiller_norm.distillers.crd import nce_loss as nce_loss
from mdistiller_norm.distillers.ctkd import ctkd_loss as ctkd_loss
from mdistiller_norm.distillers.dist import dist_loss as dist_loss
from mdistiller_norm.distillers.dkd import dkd_loss as dkd_loss
from mdistiller_norm.distillers.dtkd import dtkd_loss as dtkd_loss
from mdistiller_norm.distillers.fitnet import hint_loss as hint_loss
from mdistiller_norm.distillers.kd import kd_loss as kd_loss
from mdistiller_norm.distillers.kdsvd import kdsvd_loss as kdsvd_loss
from mdistiller_norm.distillers.logit_standardization import lsdkd_loss as lsdkd_loss
from mdistiller_norm.distillers.logit_standardization import lskd_loss as lskd_loss
from mdistiller_norm.distillers.nkd import nkd_loss as nkd_loss
from mdistiller_norm.distillers.normkd import norm_dkd_loss as norm_dkd_loss
from mdistiller_norm.distillers.normkd import normkd_loss as normkd_loss
from mdistiller_norm.distillers.nst import nst_loss as nst_loss
from mdistiller_norm.distillers.ofd import feat_loss as feat_loss
from mdistiller_norm.distillers.pkt import pkt_loss as pkt_loss
from mdistiller_norm.distillers.reviewkd import hcl_loss as hcl_loss
from mdistiller_norm.distillers.rkd import rkd_loss as rkd_loss
from mdistiller_norm.distillers.rld import rld_loss as rld_loss
from mdistiller_norm.distillers.sp import sp_loss as sp_loss
from mdistiller_norm.distillers.ttm import ttm_loss as ttm_loss
from mdistiller_norm.distillers.ttm import wttm_loss as wttm_loss
from mdistiller_norm.distillers.vid import vid_loss as vid_loss
