"""The feature store: features, captions and vocabulary on disk."""
