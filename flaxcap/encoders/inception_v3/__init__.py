"""InceptionV3 and its public weights."""
