"""Meshes of devices, and how arrays lie on them."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(devices: list | None = None) -> Mesh:
    """One axis, "data", over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    # make_mesh's default became Explicit axes, under which emb[ids] and scan carries need sharding types.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def over_images(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Of an array whose axis `axis` is images."""
    return NamedSharding(mesh, P(*[None] * axis, "data"))
