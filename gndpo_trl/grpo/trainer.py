"""`GRPOTrainer` with everything that this folder adds to it."""

from trl import GRPOTrainer

from .checkpoints import CheckpointMixin
from .launch import check_images_are_read
from .real_tokens import RealTokensMixin
from .sampling import SamplingMixin


class ExtendedGRPOTrainer(SamplingMixin, RealTokensMixin, CheckpointMixin, GRPOTrainer):
    """
    What [`GNDPOTrainer`] and [`GSPOTrainer`] stand on: [`~trl.GRPOTrainer`] that pays for real tokens, goes on exactly
    from its checkpoints, and validates at a temperature of its own.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_images_are_read(self)
