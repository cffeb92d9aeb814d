"""`python -m bench tune --device cuda`: which strategy and tile is fastest on this GPU."""
