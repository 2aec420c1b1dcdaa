"""JAX's devices, processes, meshes and memory, and the cache directory."""
