"""Trains a captioner in PyTorch: one backward pass and one Adam step a batch."""

import argparse
import time

import torch
from meter import Meter
from torch_models import GruCaptioner, ShowAttendTell
from workload import BATCH, KEPT, batches, random_features


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["gru", "sat"], default="gru", help="sat: Show, Attend and Tell's LSTM")
    parser.add_argument("--pad", default="batch", choices=["50", "20", "batch"], help="tokens of a padded caption")
    parser.add_argument("--compile", choices=["no", "step", "full"], default="no", help="torch.compile: what")
    parser.add_argument("--batch", type=int, default=BATCH, help="captions, each with an image of its own")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--warm", type=int, default=3, help="steps before them")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    return parser.parse_args()


def main() -> None:
    a = arguments()
    torch.manual_seed(0)
    if a.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which JAX multiplies float32 matrices in on a GPU
    lstm, total = a.model == "sat", a.warm + a.steps
    model = (ShowAttendTell if lstm else GruCaptioner)().to(a.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4 if lstm else 1e-3)
    loss_of = model.loss
    if a.compile == "step":
        model.step = torch.compile(model.step, dynamic=True if lstm else None)
    elif a.compile == "full":
        loss_of = torch.compile(model.loss, dynamic=False)
    plan = batches(a.pad, total, a.batch, longest_first=lstm)
    bank = torch.from_numpy(random_features()).to(getattr(torch, a.dtype))
    kept = [bank[torch.from_numpy(images)].to(a.device) for _, _, images in plan[:KEPT]]
    del bank

    def step(number: int) -> float:
        tokens, lengths, _ = plan[number]
        image, tokens = kept[number % len(kept)], torch.from_numpy(tokens).long().to(a.device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(a.device, torch.bfloat16, enabled=a.dtype == "bfloat16"):
            loss = loss_of(image, tokens, lengths.tolist()) if lstm else loss_of(image, tokens)
        loss.backward()
        if lstm:
            torch.nn.utils.clip_grad_value_(model.parameters(), 5.0)
        optimizer.step()
        return loss.item()  # waits for the device

    setting = f"{a.model} batch{a.batch} pad {a.pad} compile={a.compile} {a.device} {a.dtype}"
    meter = Meter("torch", setting, version=torch.__version__, threads=torch.get_num_threads())
    begin = time.perf_counter()
    step(0)
    first_s = time.perf_counter() - begin
    for number in range(1, a.warm):
        step(number)
    meter.start()
    loss = 0.0
    for number in range(a.warm, total):
        loss = step(number)
        meter.step(a.batch, int((plan[number][1] - 1).sum()))
    meter.finish(first_step_s=round(first_s, 1), loss=round(loss, 3))


if __name__ == "__main__":
    main()
