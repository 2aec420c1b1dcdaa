"""Image-caption data sets, prepared by TFDS."""
