"""Log lines of libraries that are hidden, and those that are not."""

import logging

import pytest
from absl import logging as absl_logging
from small_step import state_on

from flaxcap.runtime import library_logs
from flaxcap.training.checkpoints import Checkpoints


@pytest.fixture
def lines():
    """The lines that the loggers write."""
    found = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, loggers = Collect(), [absl_logging.get_absl_logger(), logging.getLogger("urllib3.connectionpool")]
    for logger in loggers:
        logger.addHandler(handler)
    yield found
    for logger in loggers:
        logger.removeHandler(handler)


def test_only_the_named_lines_are_hidden(lines):
    library_logs.hide()
    library_logs.hide()
    absl_logging.warning("Metadata file does not exist: %s", "/run/7/_CHECKPOINT_METADATA")
    absl_logging.warning("Metadata file is damaged: %s", "/run/7")
    urllib3 = logging.getLogger("urllib3.connectionpool")
    urllib3.warning("Retrying (%r) after connection broken by '%r': %s", 2, "error", "/zip")
    urllib3.warning("Certificate of %s is invalid", "host")
    assert lines == ["Metadata file is damaged: /run/7", "Certificate of host is invalid"]
    assert len(absl_logging.get_absl_logger().filters) == 1


def test_a_checkpoint_without_orbaxs_metadata_is_restored_without_a_warning(tmp_path, lines):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, state_on(1), {}, 2.0)
    checkpoints.close()
    for name in ("_CHECKPOINT_METADATA", "sha256.json"):
        (tmp_path / "7" / name).unlink()
    from flaxcap.training.checkpoints import repair

    repair(tmp_path)
    opened = Checkpoints(tmp_path)
    assert opened.restore(state_on(1))[1] == {}
    opened.close()
    assert not [line for line in lines if "Metadata" in line]
