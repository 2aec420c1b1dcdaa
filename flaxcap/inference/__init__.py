"""Loaded captioners, COCO results and plots."""
