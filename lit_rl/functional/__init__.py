"""Pure functions of tensors: rewards, advantages, losses."""
