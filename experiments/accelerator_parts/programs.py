"""Each measurement, with the benchmarks of `flaxcap bench` and the scripts of experiments/peers."""

import functools
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from accelerator_parts import gradients, kernels, machine
from accelerator_parts.sizes import Sizes, changed, on_disk, resident

from flaxcap.bench import runner

PEERS = pathlib.Path(__file__).resolve().parent.parent / "peers"
WORDS = 20  # of a generated caption, as in experiments/peers


class Found(NamedTuple):
    """A part of a measurement's result."""

    figures: list[dict[str, Any]]  # rows of the table
    details: dict[str, Any]


class MeasurementError(Exception):
    """A part of a measurement failed. The other parts are recorded."""


def figure(what: str, value: float, unit: str, notes: str = "", compile_s: float = 0.0) -> dict[str, Any]:
    """Returns a row of the table.

    Args:
      what: what was measured, in words.
      value: the figure.
      unit: of the figure.
      notes: further figures, in words.
      compile_s: seconds of compilation; 0: not measured.
    """
    return {"what": what, "value": float(value), "unit": unit, "notes": notes, "compile_s": float(compile_s)}


# Training


def train(sizes: Sizes, batch: int, dtype: str, peers: tuple[str, ...] = (), features: str = "device") -> Iterator:
    """Times training.

    Args:
      sizes: of the measurements.
      batch: a key of `Sizes.batches`.
      dtype: of the arithmetic.
      peers: options of train_torch.py, which runs after each repetition; (): no PyTorch.
      features: "device" or "stream".
    """
    own = sizes.batches[batch]
    against = [_peer("train_torch.py", f"--batch={own} --steps={min(sizes.steps, 20)}", *peers)] if peers else []
    images = resident(sizes) if features == "device" else on_disk(sizes)
    fields: dict[str, Any] = {"train__dtype": dtype, "train__batch_images": own, "train__features": features}
    result = runner.bench(
        "train",
        changed(sizes.config, **fields),
        images=images,
        steps=max(2, sizes.steps * sizes.batches[1024] // own),
        warmup=3,
        repeats=sizes.repeats,
        workers=1,
        against=against,
        peak=False,
    )
    facts, median, memory = result["facts"], result["median"], result["memory"]
    estimate, peak = max(facts["step_gb"].values()), memory.get("device_peak_gb")
    notes = [
        f"{own} images and {5 * own} captions a step, {images} images {facts['features']}",
        f"{median['step_ms']['mean']:.3g} ms a step, {median['flop_s'] / 1e12:.3g} TFLOP/s",
        f"{facts['padding_of_timed']:.0%} padding, lengths {', '.join(facts['compile_s'])}",
        f"device memory: estimate {estimate:.3g} GB, peak {f'{peak:.3g} GB' if peak else 'not reported'}",
    ]
    compile_s = sum(facts["compile_s"].values())
    rows = [figure("training", result["captions_s"], "captions/s", "; ".join(notes), compile_s)]
    yield Found(rows + _pairs(result), result)


def profile(sizes: Sizes) -> Iterator[Found]:
    """Finds the kernels of one dispatch that take most of the device's time."""
    fields: dict[str, Any] = {"train__dtype": "bfloat16", "train__batch_images": sizes.batches[1024]}
    found = kernels.profile(changed(sizes.config, **fields, train__features="device"), resident(sizes))
    notes = f"{found['events']} kernels in {found['steps']} steps; the host saw {found['dispatch_ms']:.3g} ms"
    yield Found([figure("device time of a dispatch", found["device_ms"], "ms", notes)], found)


def self_critical(sizes: Sizes) -> Iterator[Found]:
    """Times self-critical training and the host's share of a dispatch."""
    batch = sizes.batches[1024]
    fields: dict[str, Any] = {"train__dtype": "bfloat16", "train__batch_images": batch, "decode__max_length": WORDS}
    result = runner.bench(
        "self_critical",
        changed(sizes.config, **fields),
        images=sizes.scored,
        steps=max(2, sizes.steps // 4),
        warmup=0,
        repeats=min(sizes.repeats, 2),
        workers=1,
    )
    median, facts = result["median"], result["facts"]
    parts = ", ".join(f"{part} {median[f'{part}_s']:.3g} s" for part in ("sampling", "scoring", "training"))
    notes = f"{batch} images a step, 5 captions each of up to {WORDS} tokens; {parts}"
    yield Found(
        [
            figure("self-critical training", result["images_s"], "images/s", notes, facts["first_dispatch_s"]),
            figure("the host's share of a dispatch", 100 * median["host_share"], "%", "CIDEr-D of sampled captions"),
        ],
        result,
    )


# Decoding


def decode(sizes: Sizes, method: str) -> Iterator[Found]:
    """Times decoding of several batch sizes and of one image. A size that fails is left out until the end."""
    failed = []
    for images in sizes.decoded:
        try:
            yield _decoded(sizes, method, images, images == sizes.decoded[0])
        except jax.errors.JaxRuntimeError as e:  # out of memory, for example
            failed.append(f"{images} images: {e}")
    if failed:
        raise MeasurementError("; ".join(failed))


def _decoded(sizes: Sizes, method: str, images: int, latency: bool, against: tuple[str, ...] = ()) -> Found:
    fields: dict[str, Any] = {"train__dtype": "bfloat16", "decode__method": method, "decode__batch_size": images}
    result = runner.bench(
        "decode",
        changed(sizes.config, **fields, decode__max_length=WORDS, decode__beam_width=5),
        images=images,
        steps=max(2, sizes.steps // 2),
        warmup=1,
        repeats=sizes.repeats,
        workers=1,
        against=against,
    )
    median, compiled = result["median"], result["facts"]["compile_s"]
    what = "greedy" if method == "greedy" else "beam of 5"
    notes = f"{median['call_ms']['median']:.3g} ms a batch, {WORDS} tokens a caption"
    rows = [figure(f"{what}, {images} images", result["captions_s"], "captions/s", notes, compiled["batch"])]
    if latency:
        one, notes = median["one_image"]["call_ms"], "median; 10th to 90th percentile {p10:.3g} to {p90:.3g} ms"
        rows.append(figure(f"{what}, one image", one["median"], "ms", notes.format(**one), compiled["one_image"]))
    return Found(rows + _pairs(result), result)


# Extraction


def extract(sizes: Sizes) -> Iterator[Found]:
    """Times the encoder on arrays, and extraction from JPEG files with several numbers of decoder threads."""
    for threads in sizes.threads:
        result = runner.bench(
            "extract",
            changed(sizes.config, encoder__dtype="bfloat16"),
            images=sizes.photographs,
            steps=sizes.steps,
            warmup=1,
            repeats=min(sizes.repeats, 2),
            workers=threads,
        )
        median = result["median"]
        network, decoding = median["network"]["images_s"], median["decoding"]["all_threads_images_s"]
        rows = []
        if threads == sizes.threads[0]:
            notes = f"{result['facts']['batch']} images a batch, pixels in the host's memory"
            rows.append(figure("the network, from arrays", network, "images/s", notes, result["facts"]["compile_s"]))
        notes = f"decoding alone {decoding:.4g}, the network alone {network:.4g} images/s; bottleneck:"
        bottleneck = limit(result["images_s"], decoding, network)
        rows.append(
            figure(
                f"from JPEG files, decoder threads: {threads}", result["images_s"], "images/s", f"{notes} {bottleneck}"
            )
        )
        yield Found(rows, result | {"bottleneck": bottleneck})


def limit(complete: float, decoding: float, network: float) -> str:
    """Returns what limits extraction, given the images a second of all of it and of two parts alone."""
    if complete < 0.7 * min(decoding, network):
        return "neither alone; both share the host with the store's writing"
    return "decoding" if decoding < network else "the network"


# PyTorch


def torch_decode(sizes: Sizes) -> Iterator[Found]:
    """Times greedy decoding of a batch, and beam search, in pairs with PyTorch."""
    images, steps = max(sizes.decoded[:3]), f"--steps={max(2, sizes.steps // 3)}"
    greedy = _peer("decode_torch.py", f"--mode=greedy --batch={images}", steps)
    beam = _peer("decode_torch.py", "--mode=beam --k=5", steps)
    yield _decoded(sizes, "greedy", images, False, (greedy,))
    yield _decoded(sizes, "beam", min(images, 32), False, (beam,))


def _peer(script: str, *options: str) -> str:
    """Returns the command line of a script of experiments/peers, on JAX's kind of device."""
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    program = shlex.join([sys.executable, str(PEERS / script)])
    return " ".join([program, f"--device={device} --dtype=bfloat16", *options])


def _pairs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of the baselines that ran between the repetitions."""
    rows = []
    for peer in result["peers"]:
        ratio, setting = peer["ratio"], peer["records"][-1]["setting"]
        notes = f"{peer['rate']:,.0f} captions/s in PyTorch ({setting}); {ratio['min']:.3g} to {ratio['max']:.3g}"
        rows.append(figure("our rate divided by PyTorch's", ratio["median"], "times", notes))
    return rows


def compare(sizes: Sizes) -> Iterator[Found]:
    """Compares a step's gradients with a CPU's. A difference above the tolerance is a failure."""
    failed = []
    for found in gradients.compare(sizes.config, sizes.compared):
        verdict = "passes" if found["passes"] else "FAILS"
        rows = [figure(what, value, "", f"{verdict}; {notes}") for what, value, notes in found["rows"]]
        failed += [] if found["passes"] else [found["dtype"]]
        yield Found(rows, found)
    if failed:
        raise MeasurementError(f"gradients differ from the CPU's in {', '.join(failed)}")


def describe(sizes: Sizes) -> Iterator[Found]:
    """Describes the machine and times its matrix products."""
    found = machine.describe(sizes.products)
    yield Found(
        [
            figure(f"matrix products, {dtype}", rate["best"] / 1e12, "TFLOP/s", f"median {rate['median'] / 1e12:.3g}")
            for dtype, rate in found["products"].items()
        ],
        found,
    )


PROGRAMS: dict[str, Callable[[Sizes], Iterator[Found]]] = {
    "machine": describe,
    "train_bf16_256": functools.partial(train, batch=256, dtype="bfloat16"),
    "train_bf16_1024": functools.partial(train, batch=1024, dtype="bfloat16"),
    "train_bf16_2048": functools.partial(train, batch=2048, dtype="bfloat16"),
    "train_f32_1024": functools.partial(train, batch=1024, dtype="float32"),
    "train_streamed_1024": functools.partial(train, batch=1024, dtype="bfloat16", features="stream"),
    "profile": profile,
    "gradients": compare,
    "decode_greedy": functools.partial(decode, method="greedy"),
    "decode_beam5": functools.partial(decode, method="beam"),
    "extract": extract,
    "self_critical": self_critical,
    "torch_train_eager": functools.partial(train, batch=1024, dtype="bfloat16", peers=("--compile=no",)),
    # The step has one shape, so it is compiled once. The loss has a shape for each length.
    "torch_train_compiled": functools.partial(train, batch=1024, dtype="bfloat16", peers=("--compile=step",)),
    "torch_decode": torch_decode,
}
