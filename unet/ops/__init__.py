"""Operations that have kernels: ragged ones with static shapes, norms and gates. The XLA implementation defines each."""

from unet.ops.boundary_scan import boundary_scan
from unet.ops.downsample import downsample
from unet.ops.mean_pool import mean_pool
from unet.ops.mosaic import Implementation
from unet.ops.smooth import smooth
from unet.ops.upsample import token_of, upsample

__all__ = ["Implementation", "boundary_scan", "downsample", "mean_pool", "smooth", "token_of", "upsample"]
