"""Training: losses, the step, the loop, validation, checkpoints and logs."""
