"""Presets that differ from the default one."""

from flaxcap.config import Config


def changed(**values) -> Config:
    """Returns the default preset with fields such as `train__epochs` set."""
    config = Config()
    for name, value in values.items():
        *groups, field = name.split("__")
        node = config
        for group in groups:
            node = getattr(node, group)
        assert hasattr(node, field)
        setattr(node, field, value)
    return config
