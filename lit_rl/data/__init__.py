"""Prompts: generators that need no download, and readers."""
