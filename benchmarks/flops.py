"""Floating point operations of a training step and of a caption, for any config, without computing anything.

```
python benchmarks/flops.py hub_configs/kcfi-vitl14-qwen2-1.5b --pairs 32
```

PyTorch's own counter watches the model run on the meta device: matrix products, attention and convolutions count (a
multiplication and an addition are two), all else is left out, as usual. Beside it stands the peak of a matrix product
on this machine.
"""

import argparse
import functools
import time
from typing import Any

import torch
from measure import operation_counter
from torch.nn import functional as F

import kcfi

PROMPT, CAPTION = 60, 12  # tokens, about: the instruction with the chat template, a caption of LEVIR-CC with its end


def build(config: Any) -> Any:
    """The model of a config on the meta device, in fp32 and training mode, its language model frozen."""
    with torch.device("meta"):
        model: Any = kcfi.KCFIForConditionalGeneration(config).float()
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    return model.train()


def run(model: Any, rows: int, length: int, scored: int) -> torch.Tensor:
    """Encode pairs and read rows of `length` tokens behind their image tokens; the sum of both losses.

    Args:
        model: of `build`.
        rows: of a pair each.
        length: tokens of the prompt and the captions.
        scored: positions at the end that get logits.
    """
    side = model.config.image_size
    features = model.get_image_features(pixel_values=torch.zeros(rows, 2, 3, side, side, device="meta"))
    images = torch.stack(features.pooler_output)
    words = torch.zeros(rows, length, images.shape[2], device="meta")
    inputs = torch.cat([images, words], dim=1)
    mask = torch.zeros(rows, 1, inputs.shape[1], inputs.shape[1], device="meta")
    states = model.model.language_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
    logits = model.lm_head(states.last_hidden_state[:, -scored:]).flatten(0, 1)
    loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device="meta"))
    if features.mask_logits is not None:
        loss = loss + F.cross_entropy(features.mask_logits, torch.zeros_like(features.mask_logits[:, 0]).long())
    return loss


def training_flops(config: Any, pairs: int = 1, captions: int = 5, packed: bool = True) -> int:
    """Operations of a step, forward and backward, of `pairs` pairs with `captions` captions each.

    Args:
        config: KCFIConfig.
        pairs: of the step.
        captions: of each pair.
        packed: behind one prefix, with logits from the prompt's end on; or a row for each, with logits everywhere.
    """
    model = build(config)
    image_tokens = (config.image_size // config.visual_token_size) ** 2 * config.num_image_tokens
    with operation_counter() as counter:
        if packed:
            answers = captions * (1 + CAPTION)
            run(model, pairs, PROMPT + answers, answers + 1).backward()
        else:
            run(model, pairs * captions, PROMPT + CAPTION, image_tokens + PROMPT + CAPTION).backward()
    return int(counter.get_total_flops())


def caption_flops(config: Any, tokens: int = CAPTION) -> int:
    """Operations of encoding a pair and writing `tokens` tokens one after the other from a cache.

    All at once, as here, they are the same, but for a little more attention.
    """
    with operation_counter() as counter, torch.no_grad():
        run(build(config).eval(), 1, PROMPT + tokens, tokens)
    return int(counter.get_total_flops())


@functools.cache
def matmul_peak(dtype: torch.dtype = torch.float32, size: int = 2048, repeats: int = 5) -> float:
    """Operations per second of this process' threads in a product of size x size matrices; the best of `repeats`."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    left @ right
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def with_pooling(config: kcfi.KCFIConfig, pooling: int) -> kcfi.KCFIConfig:
    """The config with another `visual_token_pooling`, which a new one checks (`from_pretrained` does not)."""
    return kcfi.KCFIConfig(**{**config.to_dict(), "visual_token_pooling": pooling})


def asked(description: str | None) -> tuple[kcfi.KCFIConfig, int]:
    """The config and the number of pairs of a step that the command line asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=kcfi.embedded_model(), help="folder or Hub id (kcfi-tiny)")
    parser.add_argument("--pairs", type=int, default=1, help="of a step, with five captions each (%(default)s)")
    parser.add_argument("--visual_token_pooling", type=int, help="instead of the config's")
    options = parser.parse_args()
    config = kcfi.KCFIConfig.from_pretrained(options.config)
    if options.visual_token_pooling is not None:
        config = with_pooling(config, options.visual_token_pooling)
    return config, options.pairs


def main() -> None:
    """Print the counts of a config, packed and plain."""
    config, pairs = asked(__doc__)
    packed, plain = (training_flops(config, pairs, packed=packed) for packed in (True, False))
    step = f"training step, {pairs} pairs x 5 captions"
    print(f"{step}: {packed / 1e12:.3f} TFLOP; a row per caption: {plain / 1e12:.3f} TFLOP")
    print(f"caption of a pair: {caption_flops(config) / 1e9:.2f} GFLOP")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"peak of a matrix product here, {dtype}: {matmul_peak(dtype) / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
