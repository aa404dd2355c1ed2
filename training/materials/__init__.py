"""Real surfaces for drawn pairs: single-date images of any source, cut into a library."""
