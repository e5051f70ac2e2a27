"""What ships: one file per format, and the bundle."""
