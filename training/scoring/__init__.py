"""Scores of captions and masks, and the evaluation of a model."""
