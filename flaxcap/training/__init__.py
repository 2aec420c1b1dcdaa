"""The loss, the train step, validation, checkpoints and logs."""
