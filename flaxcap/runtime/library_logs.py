"""Hides log lines of libraries that tell users nothing: flaxcap handles what they report, or says it itself."""

import logging

import absl.logging

_HIDDEN = {
    # Orbax 0.12 warns of each missing metadata file. `Checkpoints` compares all files with their checksums before.
    absl.logging.get_absl_logger().name: "Metadata file does not exist: ",
    # Each failed attempt of a download. The error after the last one names the address.
    "urllib3.connectionpool": "Retrying (",
}


class _Hide(logging.Filter):
    """Drops lines whose text, before its values are filled in, begins with `name`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.name)


def hide() -> None:
    """Hides these lines from now on. A second call changes nothing."""
    for logger, start in _HIDDEN.items():
        found = logging.getLogger(logger)
        if not any(isinstance(one, _Hide) for one in found.filters):
            found.addFilter(_Hide(start))
