"""Pairs of images: their schema, the readers of every form they come in, the order of visits, augmentation."""
