"""Scenes: two or more large georeferenced images of one place -> polygons of change with sentences, and a report."""
