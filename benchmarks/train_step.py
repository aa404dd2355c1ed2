"""A training step: five captions behind one prefix, against one row per caption.

```
python benchmarks/train_step.py
python benchmarks/train_step.py --compiled --cases kcfi-tiny --pairs 2     # the packed step, as it is and compiled
```

The plain side is what a careful user of transformers writes: a row for each caption with its own images and prompt,
logits at every position. Both sides have the same weights, pairs, captions, instruction, precision and optimizer; the
language model is frozen, all else is trained. The gradients are compared in fp32. Two models: the embedded model in
fp32; and DINOv2-S with SmolLM2-135M (their sizes with random weights, which cost the same) under bf16 autocast, the
weights of the language model in bf16 on both sides (`bf16_language_model`).

`--compiled` compares the packed step with itself under `torch.compile` instead, what `torch_compile: true` of a recipe
does. The minutes of the first compiled step are left out, and so are operations.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flops import matmul_peak, with_pooling
from measure import comparison, loaded_memory, options_of, report, take_turns, warm_up
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

import kcfi
from kcfi.modeling_kcfi.change_detection_head import mask_loss
from kcfi.training.collator import IGNORED, KCFICollator, training_inputs
from kcfi.training.parameters import cast_frozen_language_model
from kcfi.training.synthetic.dataset import SyntheticDataset

CASES = {"kcfi-tiny": 6.0, "kcfi-dinov2s-smollm2-135m": 4.5}  # folder of hub_configs, and the bar
COMPILED = 1.6  # bar of a compiled step against the same as it is


def build(case: str, words: bool = False, pooling: int | None = None) -> tuple[Any, Any]:
    """Model in training mode and processor of a case; the processor is kcfi-tiny's, with the words of its captions.

    Args:
        case: folder of hub_configs; random weights but for kcfi-tiny.
        words: give the model no more tokens than the processor can decode.
        pooling: `visual_token_pooling` instead of the config's.
    """
    folder = kcfi.embedded_model()
    processor = AutoProcessor.from_pretrained(folder)
    config = kcfi.KCFIConfig.from_pretrained(Path(folder).parent / case)
    if pooling is not None:
        config = with_pooling(config, pooling)
    torch.manual_seed(0)
    if case == "kcfi-tiny":
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, config=config, dtype=torch.float32)
    else:
        config.image_token_id = processor.image_token_id
        if words:
            config.text_config.vocab_size = len(processor.tokenizer)
        model = kcfi.KCFIForConditionalGeneration(config)
        processor.image_processor.size = {"height": config.image_size, "width": config.image_size}
    processor.patch_size = config.visual_token_size
    model.train().model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model, processor


def plain_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Caption and mask loss of one row per caption, from the logits of all positions."""
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "position_ids")}
    outputs = model(**inputs, attention_mask=(batch["segment_ids"] >= 0).long(), use_cache=False)
    logits = outputs.logits[:, :-1].float().flatten(0, 1)
    caption = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    return caption + mask_loss(outputs.mask_logits, batch["mask_labels"])


def packed_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The same of packed rows, as `KCFITrainer` computes it."""
    loss: torch.Tensor = model(**training_inputs(batch, model.model.language_model), use_cache=False).loss
    return loss


def make_sides(
    num_pairs: int, model: Any, processor: Any, compiled: bool = False
) -> dict[str, Callable[[bool], None]]:
    """The sides "plain" and "ours": functions that do a step on the same pairs, in bf16 or not.

    Args:
        num_pairs: of a step.
        model: of `build`.
        processor: of `build`.
        compiled: both sides are packed, ours is compiled.
    """
    pairs = SyntheticDataset(num_pairs, seed=5)
    examples = [pairs[index] for index in range(num_pairs)]
    rows = [{**example, "captions": [caption]} for example in examples for caption in example["captions"]]
    classes: Any = {2: "change", 3: "road_building"}[model.config.num_change_classes]
    batches = {
        "plain": KCFICollator(processor, classes, 1)(rows),
        "ours": KCFICollator(processor, classes, 5)(examples),
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # the cost of Trainer's optimizer without its effect: every round has the same weights
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)

    def step(network: Any, batch: dict[str, Any], loss_of: Callable[..., torch.Tensor], bf16: bool) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(network, batch)
        loss.backward()
        optimizer.step()

    packed = partial(step, model, batches["ours"], packed_loss)
    if compiled:
        return {"plain": packed, "ours": partial(step, torch.compile(model), batches["ours"], packed_loss)}
    return {"plain": partial(step, model, batches["plain"], plain_loss), "ours": packed}


def gradients(side: Callable[[bool], None], model: Any) -> dict[str, torch.Tensor]:
    """What a step of a side in fp32 leaves in the parameters."""
    side(False)
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def difference(sides: dict[str, Callable[[bool], None]], model: Any) -> float:
    """How far the gradients of both sides are apart: the worst parameter, relative to the norm of its gradient."""
    plain, ours = (gradients(sides[name], model) for name in ("plain", "ours"))
    model.zero_grad()
    assert plain.keys() == ours.keys()
    norms = {name: float(plain[name].norm()) for name in plain}
    small = 1e-6 * max(norms.values())  # biases in front of a softmax or a norm have none but rounding
    return max(float((plain[name] - ours[name]).norm()) / norms[name] for name in plain if norms[name] > small)


def main() -> None:
    """Print captions per second of both sides."""
    parser = options_of(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="models (all)")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2], help="pairs of a step (%(default)s)")
    parser.add_argument("--visual_token_pooling", type=int, help="instead of the config's, on both sides")
    parser.add_argument("--compiled", action="store_true", help="the packed step, as it is and compiled")
    options = parser.parse_args()
    rows = []
    for case in options.cases:
        model, processor = build(case, pooling=options.visual_token_pooling)
        bf16 = case != "kcfi-tiny"
        dtype = torch.bfloat16 if bf16 else torch.float32
        cast_frozen_language_model(model, dtype)
        loaded = loaded_memory()
        for num_pairs in options.pairs:
            sides = make_sides(num_pairs, model, processor, options.compiled)
            timed = {name: lambda side=side, bf16=bf16: side(bf16) for name, side in sides.items()}
            operations = None if options.compiled else warm_up(timed)[1]  # the counter would see no compiled kernel
            if options.compiled:
                take_turns(timed, 1)
            rounds = take_turns(timed, options.repeats, loaded)
            cast_frozen_language_model(model, torch.float32)
            worst = difference(sides, model)
            assert worst < 1e-4, f"the gradients differ by {worst:.1e}"
            cast_frozen_language_model(model, dtype)
            title = f"{case}, {'bf16' if bf16 else 'fp32'}, {num_pairs} pairs x 5 captions"
            title += ", packed, as it is and compiled" if options.compiled else ""
            equal = f"gradients to {worst:.0e}"
            bar, work = COMPILED if options.compiled else CASES[case], 5 * num_pairs
            rows.append(comparison(title, rounds, work, "captions/s", bar, equal, operations, matmul_peak(dtype)))
    report("train_step", rows, options.json)


if __name__ == "__main__":
    main()
