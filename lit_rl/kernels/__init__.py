"""Loops over numbers that are compiled for a CPU; imported where they run, since importing them takes half a second."""
