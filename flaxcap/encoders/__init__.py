"""Image encoders: pixels to feature vectors. base.py is their interface and registry."""
