"""Image encoders: the frozen network, its weights, and the pixels it takes."""
