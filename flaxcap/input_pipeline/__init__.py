"""Batches of captions, and the feed that puts them on the devices."""
