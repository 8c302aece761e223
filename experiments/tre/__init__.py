"""Trust-region entropy: exploration that leaves the tail of the vocabulary alone."""
