"""Policies that are a table of logits: what a method does, in seconds and with exact results."""
