"""Drawn pairs: where things stand, what is said of them, how they are painted."""
