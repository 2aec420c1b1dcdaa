"""JAX's devices, processes, meshes and memory."""
