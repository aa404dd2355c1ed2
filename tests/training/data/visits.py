"""The file names that a run visits; under torchrun, those of each rank, with and without loader workers, to a file."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import load_dataset

from kcfi import KCFIForConditionalGeneration
from kcfi.processing import KCFIProcessor
from kcfi.training.collator import KCFICollator
from kcfi.training.data.shards import ShardDataset
from kcfi.training.trainer import KCFITrainer
from tests.training.test_trainer import arguments, losses

PAIRS, BATCH = 22, 2
STOP = 3  # optimizer steps before a run is resumed


class Visits(KCFITrainer):
    """Notes the pairs of each step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.visited = [*getattr(self, "visited", []), *inputs["filenames"]]
        return super().training_step(model, inputs, num_items_in_batch)


def visits(folder, pairs, resume=0, save_steps=0, workers=0, **more):
    """Train for two epochs (or `max_steps`) with augmentation, from the checkpoint of a step if given.

    Returns:
        The trainer; `visited` are the file names in their order.
    """
    save = {"save_strategy": "steps", "save_steps": save_steps} if save_steps else {}
    settings = {"per_device_train_batch_size": BATCH, "num_train_epochs": 2, "dataloader_num_workers": workers}
    processor = KCFIProcessor.from_pretrained(folder / "model")
    trainer = Visits(
        KCFIForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32),
        arguments(folder / "run", **{**settings, **save, **more}),
        KCFICollator(processor, augment=True),
        train_dataset=pairs,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{resume}") if resume else None)
    return trainer


if __name__ == "__main__":
    root, kind = Path(sys.argv[1]), sys.argv[2]
    data = ShardDataset(str(root / "shards"), "train")
    for number in (0, 2):
        source, steps = data, {}
        if kind == "stream":
            rows = load_dataset(str(root / "shards"), split="train").select(range(20))
            source, steps = rows.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=3), {"max_steps": 10}
        full = visits(root, source, save_steps=STOP, workers=number, **steps)
        resumed = visits(root, source, resume=STOP, workers=number, **steps)
        assert [line["loss"] for line in losses(resumed)] == [line["loss"] for line in losses(full)]
        names = [pair["filename"] for pair in data]
        run = {"full": full.visited, "resumed": resumed.visited, "names": names}
        (root / f"visits_{os.environ['RANK']}_{number}.json").write_text(json.dumps(run))
