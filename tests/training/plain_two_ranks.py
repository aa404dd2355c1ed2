"""Run by test_trainer under torchrun: a plain Trainer on two ranks; rank 0 writes the gradients of the first step.

torchrun --nproc_per_node 2 plain_two_ranks.py FOLDER
"""

import sys
from pathlib import Path

import torch

from kcfi import KCFIForConditionalGeneration
from kcfi.processing import KCFIProcessor
from tests.training.conftest import Pairs
from tests.training.test_trainer import Gradients, plain_trainer

folder = Path(sys.argv[1])
model = KCFIForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
processor = KCFIProcessor.from_pretrained(folder / "model")
keep = Gradients()
settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
trainer = plain_trainer(model, processor, folder / "two", Pairs(4), keep, **settings)
trainer.train()
if trainer.is_world_process_zero():
    torch.save({name.removeprefix("module."): gradient for name, gradient in keep.first.items()}, folder / "plain.pt")
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
