"""A finished run on the Hub: its files and its model card."""
