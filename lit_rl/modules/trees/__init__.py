"""Responses that are drawn as trees: where they branch, and what a training batch takes of them."""
