"""Compiles a training step for accelerators that need not be present, and counts what XLA makes of it.

    pip install 'jax[tpu]'      # or, in another environment, 'jax[cuda12]': no device and no driver is needed
    python experiments/aot_counts.py --topology=v5e:8x8 --images=1024      # or --topology=h100:8

Prints the memory of a device, the collectives, and for each loop of the step its kernels and the bytes of device memory
that they read and write. Of a sliced operand, the slice counts. For a TPU it prints the compiler's estimate of cycles,
too. A GPU's matrix products go to cuBLAS: autotuning, which needs the GPU, would choose it for most of them.
"""

import argparse
import collections
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# JAX reads JAX_PLATFORMS when it is imported, so this line comes before the imports of jax and flaxcap.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from flaxcap import config as config_lib
from flaxcap.input_pipeline.device_feed import Inputs
from flaxcap.models import decoder as decoder_lib
from flaxcap.runtime import sharding
from flaxcap.training import losses
from flaxcap.training import step as step_lib
from flaxcap.training.optimizer import learning_rate, make_optimizer
from flaxcap.training.state import init_state

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3" """
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
# Operations that move nothing, or that are counted where they start.
FREE = re.compile("parameter|constant|iota|tuple|get-tuple|bitcast|after-all|partition-id|opt-barrier|.*-done")


class Op(NamedTuple):
    """An operation of an HLO program."""

    type: str
    code: str
    args: list[str]
    rest: str  # arguments and attributes

    def calls(self, key: str) -> list[str]:
        """Returns the names of the computations in an attribute."""
        found = re.search(key + r"=\{?(%[^ ,}]+(?:, %[^ ,}]+)*)", self.rest)
        return re.findall(r"%([\w.-]+)", found[1]) if found else []


def devices(topology: str) -> list:
    """Returns devices that exist only for the compiler: "h100:8", "v5e:8x8"."""
    name, shape = topology.split(":")
    if name == "h100":
        return topologies.get_topology_desc(name, "cuda", topology=f"1x1x{shape}", target_config=H100).devices
    options = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
    return topologies.get_topology_desc(topology, "tpu", **options).devices


def compile_step(a: argparse.Namespace) -> jax.stages.Compiled:
    """Compiles the train step of the default model in bfloat16, for the sizes of the command line."""
    config = config_lib.Config()
    config.train.dtype = "bfloat16"
    mesh = sharding.make_mesh(devices(a.topology))
    bind, init = decoder_lib.create(config, decoder_lib.Sizes(64, 2048, a.vocabulary))
    schedule = learning_rate(config.train, 1000)
    optimizer = make_optimizer(config.train)
    step = step_lib.make_train_step(bind, optimizer, schedule, mesh, config.train, 1000)
    state = jax.eval_shape(lambda: init_state(init, optimizer, 0, sharding.make_mesh(jax.devices())))
    everywhere, images, later = sharding.replicated(mesh), sharding.over_images(mesh), sharding.over_images(mesh, 1)
    bank = (-(-a.bank // mesh.size) * mesh.size, 64, 2048), jnp.bfloat16, images
    shapes = ((), jnp.int32), ((a.captions, a.time), jnp.int32), ((a.captions,), jnp.float32)
    batches = [((1, a.images, *rest), dtype, later) for rest, dtype in shapes]
    state = jax.tree.map(lambda x: x.update(sharding=everywhere), state)
    count = (), jnp.int32, everywhere
    arrays: Any = (jax.ShapeDtypeStruct(s, d, sharding=on) for s, d, on in (bank, *batches, count))
    inputs = Inputs(*arrays)
    options = {"xla_gpu_enable_triton_gemm": False} if a.topology.startswith("h100") else {}
    return step.lower(state, inputs).compile(compiler_options=options)


def parse(text: str) -> dict[str, dict[str, Op]]:
    """Parses HLO text into {computation: {name: operation}}. The last computation is the entry."""
    computations, here = {}, {}
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            here = computations[head[1]] = {}
        elif found := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$", line):
            name, type_, code, rest = found.groups()
            here[name] = Op(type_, code, re.findall(r"%([\w.-]+)", rest.split("), ")[0]), rest)
    return computations


def size(type_: str, everywhere: bool = False) -> int:
    """Returns the bytes of a type's arrays in the device's main memory, or in any memory.

    S(1) marks the memory on a TPU's chip.
    """
    arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", type_)
    kept = [(d, n) for d, n, layout in arrays if d in BYTES and (everywhere or not re.search(r"S\([1-9]", layout))]
    return sum(BYTES[d] * math.prod(int(x) for x in n.split(",") if x) for d, n in kept)


def traffic(op: Op, here: dict[str, Op], computations: dict) -> int:
    """Returns the bytes of device memory that an operation reads and writes."""
    if "AllocateBuffer" in op.rest or "ConcatBitcast" in op.rest:
        return 0
    if op.code in ("copy-start", "slice-start"):  # (to, from, context), or ((from), to, context)
        return size(op.type, True) // 2 if "S(1)" in op.type else size(op.type)
    read = [size(here[a].type) if a in here else 0 for a in op.args]
    written = size(op.type.split(", s8[")[0])  # without cuBLAS's workspace
    inner = computations[op.calls("calls")[0]] if op.code == "fusion" else {}
    for i, name in [(int(o.rest.split(")")[0]), name) for name, o in inner.items() if o.code == "parameter"]:
        names, users = {name}, []
        for n, o in inner.items():  # in order of definition
            if names & set(o.args):
                names |= {n} if o.code == "bitcast" else set()
                users += [o] if o.code != "bitcast" else []
        if users and all(o.code in ("dynamic-slice", "gather") and o.args[0] in names for o in users):
            read[i] = min(read[i], sum(size(o.type, True) for o in users))
        elif users and all(o.code == "dynamic-update-slice" and o.args[0] in names for o in users):
            written -= read[i] and read[i] - sum(size(inner[o.args[1]].type, True) for o in users)
            read[i] = 0
    return sum(read) + max(written, 0)


def kernels(computations: dict, name: str, branch: int, loop: str = "outside", times: int = 1) -> Iterator[tuple]:
    """Yields (loop, repetitions, name, operation, bytes, cycles) of each kernel.

    Args:
      computations: of `parse`.
      name: of the computation to begin with.
      branch: the loss compiles one branch for each size of packed tokens; this one is taken.
      loop: the loops around the computation, in words.
      times: the repetitions of the computation.
    """
    here = computations[name]
    for name, op in here.items():
        if op.code == "while":
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', op.rest)
            limits = [o.rest for o in computations[op.calls("condition")[0]].values() if o.code == "constant"]
            count = int(
                known[1] if known else limits[0].split(")")[0] if limits else 1
            )  # the loop over steps has no limit
            inside = f"{loop}, {name} x {count}".removeprefix("outside, ") if known or limits else loop
            yield from kernels(computations, op.calls("body")[0], branch, inside, times * count)
        elif op.code == "conditional":
            # Over the sizes of packed tokens, or over skipping an update.
            branches = op.calls("branch_computations") or op.calls("true_computation")
            yield from kernels(computations, branches[min(branch, len(branches) - 1)], branch, loop, times)
        elif not FREE.match(op.code):
            cycles = re.search(r'estimated_cycles":"(\d+)"', op.rest)
            yield loop, times, name, op, traffic(op, here, computations), int(cycles[1]) if cycles else 0


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--topology", default="v5e:1x1", help="v5e:ROWSxCOLUMNS, or h100:GPUS")
    for name, default in {"images": 1024, "captions": 5, "time": 16, "vocabulary": 5001, "bank": 113287}.items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--real", type=float, default=11.5 / 15, help="fraction of padded tokens that are real")
    a = p.parse_args()
    compiled = compile_step(a)
    m: Any = compiled.memory_analysis()
    print(f"{a}\narguments {m.argument_size_in_bytes / 1e6:.0f} MB, temporary {m.temp_size_in_bytes / 1e6:.0f} MB")
    cost: Any = compiled.cost_analysis() or {}
    print({k: cost[k] for k in ("flops", "bytes accessed", "optimal_seconds") if k in cost})
    padded = a.images // len(devices(a.topology)) * a.captions * (a.time - 1)
    branch = sum(size < a.real * padded for size in losses.sizes(padded))
    computations = parse(compiled.as_text() or "")
    loops = collections.defaultdict(list)
    for loop, times, name, op, moved, cycles in kernels(computations, list(computations)[-1], branch):
        loops[loop, times].append((max(moved, cycles * 500), name, op.type, moved / 1e6, cycles))
        if re.match("all-|reduce-scatter|collective", op.code):
            print(f"{op.code} of {size(op.type, True) / 1e6:.2f} MB")
    for (loop, times), inside in loops.items():
        moved, cycles = (sum(k[i] for k in inside) for i in (3, 4))
        print(f"\n{times} times, {loop}: {len(inside)} kernels, {moved:.1f} MB, {cycles} cycles")
        for _, name, type_, moved, cycles in sorted(inside, reverse=True)[:5]:
            print(f"  {moved:9.2f} MB {cycles:9} cycles  {name:34} {type_[:60]}")


if __name__ == "__main__":
    main()
