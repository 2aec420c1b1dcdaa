"""Image encoders: pixels to a grid of features."""
