"""Programs for those who work on the package; none is installed with it."""
