"""`flaxcap bench`: measures this machine."""

import types

from flaxcap.bench import runner
from flaxcap.config import Config
from flaxcap.errors import UserError
from flaxcap.runtime import devices
from flaxcap.training import step


def run(flags: types.SimpleNamespace, config: Config, positional: list[str]) -> int:
    """Runs `flaxcap bench` and returns its exit status."""
    if len(positional) != 1:
        found = " ".join(positional) or "nothing"
        raise UserError(f"found {found}, expected one of {', '.join(runner.BENCHMARKS)}")
    (what,) = positional
    if what in ("train", "input"):
        devices.share_cores(config.train.batch_images, step.CPU_IMAGES)
    runner.bench(
        what,
        config,
        images=flags.images,
        steps=flags.steps,
        warmup=flags.warmup,
        repeats=flags.repeats,
        workers=flags.workers,
        against=flags.against,
        out=flags.out,
    )
    return 0
