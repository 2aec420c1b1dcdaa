"""Encodes images by timm's InceptionV3 in PyTorch: 299 pixels, random weights, no JPEG decoding."""

import argparse
import time

import torch
from meter import Meter

if not torch.version.cuda:
    # The torchvision 0.28.0 of PyPI is built for CUDA, and its compiled operators do not load beside a CPU build of
    # torch 2.13.0. timm uses only its Python part, whose import fails unless these two operators are declared.
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="timed batches")
    parser.add_argument("--channels_last", action="store_true", help="the memory layout")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    a = parser.parse_args()
    network = timm.create_model("inception_v3", pretrained=False, aux_logits=False).eval()
    pixels = [torch.rand(a.batch, 3, 299, 299) * 2 - 1 for _ in range(3)]
    if a.channels_last:
        network = network.to(memory_format=torch.channels_last)
        pixels = [x.to(memory_format=torch.channels_last) for x in pixels]
    encode = torch.compile(network.forward_features) if a.compile else network.forward_features
    setting = f"inception_v3 batch{a.batch}{' channels_last' * a.channels_last}{' compile' * a.compile}"
    version = f"{torch.__version__}, timm {timm.__version__}"
    meter = Meter("timm", setting, "images", version=version, threads=torch.get_num_threads())
    with torch.inference_mode():
        begin = time.perf_counter()
        feats = encode(pixels[0])
        first_s = time.perf_counter() - begin
        if feats.shape != (a.batch, 2048, 8, 8):
            raise RuntimeError(f"features: found {tuple(feats.shape)}, expected {(a.batch, 2048, 8, 8)}")
        encode(pixels[1])
        meter.start()
        for number in range(a.steps):
            encode(pixels[number % 3]).flatten(2).transpose(1, 2).contiguous().numpy()
            meter.step(a.batch)
    meter.finish(first_step_s=round(first_s, 1))


if __name__ == "__main__":
    main()
