"""Image files: fetched, checked, and decoded to pixels."""
