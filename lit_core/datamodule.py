"""What data modules share whose samplers shard by rank themselves."""

from lightning.pytorch import LightningDataModule


class RankedDataModule(LightningDataModule):
    """Base of data modules that ask which of how many processes this is; without a trainer it is the only one."""

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1
