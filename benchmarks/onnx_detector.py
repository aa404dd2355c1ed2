"""How fast a detector file of `kcfi export` is in onnxruntime, beside the same part of the model in PyTorch.

```
kcfi export --output detector.onnx
python benchmarks/onnx_detector.py detector.onnx
```
"""

import argparse
import statistics
import time

import onnxruntime
import torch

from kcfi.models import load
from kcfi.onnx import Detector


def measure(path: str, model: str, pairs: int) -> dict[str, float]:
    """Median CPU milliseconds per forward of one pair, on one thread; both take turns, so other work slows both."""
    torch.set_num_threads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    loaded = load(model)[0].float().cpu()
    detector, side = Detector(loaded), loaded.config.image_size
    times: dict[str, list[float]] = {"PyTorch": [], "onnxruntime": []}
    for _ in range(pairs + 1):
        pixels = torch.randn(1, 2, 3, side, side)
        for name in times:
            start = time.process_time()
            if name == "PyTorch":
                with torch.no_grad():
                    detector(pixels)
            else:
                session.run(None, {"pixel_values": pixels.numpy()})
            times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}  # the first one warms up


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="ONNX file")
    parser.add_argument("--model", default="kcfi-tiny", help="the model that it was exported from (%(default)s)")
    parser.add_argument("--pairs", type=int, default=50, help="number of forwards (%(default)s)")
    options = parser.parse_args()
    medians = measure(options.file, options.model, options.pairs)
    print(", ".join(f"{name}: {value:.0f} ms" for name, value in medians.items()))
    print(f"PyTorch / onnxruntime: {medians['PyTorch'] / medians['onnxruntime']:.2f}")
