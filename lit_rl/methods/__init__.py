"""Methods, one LightningModule each."""
