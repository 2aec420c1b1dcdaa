"""The mesh of devices, and shardings over it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(devices: list | None = None) -> Mesh:
    """Returns a mesh with one axis, "data", over the given devices, or over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    # Since jax 0.9, make_mesh defaults to Explicit axes, under which emb[ids] and scan carries need sharding types.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, P())


def over_images(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding of an array whose axis `axis` is split over the devices, by images."""
    return NamedSharding(mesh, P(*[None] * axis, "data"))
