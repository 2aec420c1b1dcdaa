"""Progress bars."""

from collections.abc import Iterable
from typing import Any


def bar(items: Iterable[Any], name: str, unit: str, total: int | None = None) -> Iterable[Any]:
    """Returns the items, with a progress bar on a terminal.

    Args:
      items: what is iterated over.
      name: of the bar.
      unit: of an item, such as "images".
      total: number of items; None: `len(items)`.
    """
    try:
        # Imported here: `flaxcap bench` and experiments/accelerator.py run without tqdm, which jax, flax and orbax
        # do not install.
        import tqdm
    except ImportError:
        return items
    return tqdm.tqdm(items, name, total=total, unit=f" {unit}", disable=None)
