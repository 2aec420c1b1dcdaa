"""Captions images in PyTorch, with random weights and always 20 words: greedy, or beam search of one image."""

import argparse

import torch
from meter import Meter
from torch_models import GruCaptioner, ShowAttendTell
from workload import START, VOCABULARY, random_features

STEPS = 20
IMAGES = 256


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["gru", "sat"], default="gru", help="sat: Show, Attend and Tell's LSTM")
    parser.add_argument("--mode", choices=["greedy", "beam"], default="greedy")
    parser.add_argument("--batch", type=int, default=64, help="images decoded together (greedy)")
    parser.add_argument("--k", type=int, default=3, help="hypotheses (beam)")
    parser.add_argument("--steps", type=int, default=25, help="timed batches")
    parser.add_argument("--warm", type=int, default=3, help="batches before them")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and features")
    return parser.parse_args()


def greedy(model, image):
    """Returns token ids `[B, 20]`."""
    (memory, state), found = model.start(image), []
    tokens = torch.full((len(image),), START, device=image.device)
    for _ in range(STEPS):
        state = model.step(model.embedding(tokens), memory, state)
        tokens = model.logits(state).argmax(-1)
        found.append(tokens)
    return torch.stack(found, 1)


def beam(model, image, width):
    """Returns the best hypothesis `[21]` of one image.

    Features are gathered with the hypotheses at every step, as the tutorial does.
    """
    memory, state = (tuple(x.expand(width, *x.shape[1:]) for x in part) for part in model.start(image))
    tokens = torch.full((width, 1), START, device=image.device)
    total = torch.zeros(width, 1, device=image.device)
    for t in range(STEPS):
        state = model.step(model.embedding(tokens[:, -1]), memory, state)
        scores = total + torch.log_softmax(model.logits(state).float(), -1)
        # All hypotheses are equal before the first word, so the first one's words are the candidates.
        best, place = (scores[0] if t == 0 else scores.view(-1)).topk(width)
        rows = place // VOCABULARY
        tokens = torch.cat([tokens[rows], (place % VOCABULARY)[:, None]], 1)
        memory, state = (tuple(x[rows] for x in part) for part in (memory, state))
        total = best[:, None]
    return tokens[total.argmax()]


def main() -> None:
    a = arguments()
    torch.manual_seed(0)
    if a.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which JAX multiplies float32 matrices in on a GPU
    dtype = getattr(torch, a.dtype)
    model = (ShowAttendTell if a.model == "sat" else GruCaptioner)().to(a.device, dtype).eval()
    bank = torch.from_numpy(random_features(IMAGES)).to(a.device, dtype)
    images = 1 if a.mode == "beam" else a.batch
    name = f"beam{a.k} one image" if a.mode == "beam" else f"greedy batch{images}"
    setting = f"{a.model} {name} {STEPS} steps {a.device} {a.dtype}"
    meter = Meter("torch", setting, version=torch.__version__, threads=torch.get_num_threads())

    def caption(number: int) -> None:
        image = bank[[(number * images + n) % IMAGES for n in range(images)]]
        tokens = beam(model, image, a.k) if a.mode == "beam" else greedy(model, image)
        tokens.cpu()  # waits for the device

    with torch.inference_mode():
        for number in range(a.warm):
            caption(number)
        meter.start()
        for number in range(a.steps):
            caption(number)
            meter.step(images, images * STEPS)
    meter.finish()


if __name__ == "__main__":
    main()
