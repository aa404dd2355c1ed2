"""Run by test_trainer under torchrun: the first gradients, the log and the scores of two ranks, written by rank 0."""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object

from kcfi import KCFIForConditionalGeneration
from kcfi.processing import KCFIProcessor
from kcfi.training.collator import KCFICollator
from kcfi.training.trainer import KCFITrainer
from tests.training.conftest import Pairs
from tests.training.test_trainer import TWO_RANKS, Gradients, arguments, losses

folder = Path(sys.argv[1])
model = KCFIForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
processor = KCFIProcessor.from_pretrained(folder / "model")
keep = Gradients()
trainer = KCFITrainer(
    model,
    arguments(folder / "two", per_device_eval_batch_size=2, **TWO_RANKS),  # 4 pairs on each rank
    KCFICollator(processor, seed=3),
    train_dataset=Pairs(8, masks="some"),
    eval_dataset=Pairs(5),  # the sampler repeats pairs to fill the last batches; they must not count twice
    processing_class=processor,
    callbacks=[keep],
)
trainer.train()
metrics = trainer.evaluate()
scores = {name: value for name, value in metrics.items() if "runtime" not in name and "second" not in name}
assert all(scores == other for other in gather_object([scores]))  # both ranks know what rank 0 scored
if trainer.is_world_process_zero():
    gradients = {name.removeprefix("module."): gradient for name, gradient in keep.first.items()}
    torch.save({"gradients": gradients, "log": json.dumps(losses(trainer)), **metrics}, folder / "two_ranks.pt")
