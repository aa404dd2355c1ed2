"""The small vision tower of kcfi-tiny: an XCiT that learns from scratch what stands where at a single date.

```
python -m kcfi.training.towers.vision_tower --output runs/tiny-vit               # what kcfi-tiny was made with
python -m kcfi.training.towers.vision_tower --output runs/tiny-vit --steps 5     # a trial, under a minute
```

XCiT (arXiv 2106.09681) is a ViT whose attention mixes channels instead of patches, so that its time grows with the
number of patches and not with its square: patches of 8 px, which small houses and roads need, are affordable. Its stem
of convolutions also learns from scratch with far fewer images than one linear map per patch (docs/lab_log.md).

The paper starts from a tower pretrained on a large data set. kcfi-tiny has none, and the change loss alone teaches
slowly: few pixels change, and what did not change has no label. So the tower first learns to name road, villa and
large building on synthetic dates, one at a time, read by a linear map of the same stage features that KCFI compares.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import TimmWrapperConfig, TimmWrapperModel, Trainer, TrainingArguments

from kcfi.processing import KCFIImageProcessor
from kcfi.training.sharing.model_card import write_tower_card
from kcfi.training.synthetic.dataset import Scene, SyntheticDataset
from kcfi.training.synthetic.layout import Shapes, crop

LAYERS = (1, 3, 5, 7)  # the blocks that KCFI reads, four evenly spaced ones; timm counts from 0
CLASSES = ("background", "road", "villa", "large building")


def objects(scene: Scene) -> NDArray[np.uint8]:
    """What stands where in the after image: class ids of `CLASSES`, (H, W)."""
    layout, state = scene.layout, scene.states[1]
    shapes = Shapes(layout.canvas)
    for road in layout.present_roads(state):
        shapes.road(road, fill=1)
    shapes.islands(layout.present_roads(state), 0)
    for building in layout.present_buildings(state):
        for polygon in building.footprint():
            shapes.polygon(polygon, CLASSES.index(building.kind))
    return crop(shapes.sharp())


class Dates(Dataset[dict[str, Any]]):
    """After images of synthetic scenes and their class ids, turned and mirrored at random.

    Args:
        scenes: to paint.
        processor: image -> pixel values.
    """

    def __init__(self, scenes: SyntheticDataset, processor: KCFIImageProcessor) -> None:
        self.scenes, self.processor = scenes, processor

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, scene = self.scenes.paint_after(index)
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        labels = torch.from_numpy(objects(scene).astype(np.int64))
        turns, mirror = int(torch.randint(4, ())), bool(torch.randint(2, ()))
        pixels, labels = torch.rot90(pixels, turns, (1, 2)), torch.rot90(labels, turns, (0, 1))
        if mirror:
            pixels, labels = pixels.flip(2), labels.flip(1)
        return {"pixel_values": pixels, "labels": labels}


class Namer(nn.Module):
    """A tower and a linear map of its stage features: (B, 3, H, W) -> class scores (B, classes, H, W).

    Args:
        tower: trained in place.
    """

    def __init__(self, tower: TimmWrapperModel) -> None:
        super().__init__()
        self.tower = tower
        self.linear = nn.Conv2d(len(LAYERS) * tower.timm_model.embed_dim, len(CLASSES), kernel_size=1)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross-entropy per pixel, as `loss`."""
        stages = self.tower(pixel_values, output_hidden_states=list(LAYERS)).hidden_states
        scores = self.linear(torch.cat(list(stages), dim=1)).float()
        scores = F.interpolate(scores, size=labels.shape[-2:], mode="bilinear")
        return {"loss": F.cross_entropy(scores, labels)}


def main(argv: list[str] | None = None) -> None:
    """Build the tower, pretrain it, save a folder that `vision_model` of a recipe takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of 16 images (0: random weights)")
    parser.add_argument("--seed", type=int, default=1, help="of scenes and weights")
    arguments = parser.parse_args(argv)

    torch.manual_seed(arguments.seed)
    size: dict[str, Any] = {"img_size": 256, "embed_dim": 128, "depth": 8, "num_heads": 4, "cls_attn_layers": 0}
    config = TimmWrapperConfig(architecture="xcit_nano_12_p8_224", model_args=size, do_pooling=False)
    tower, processor = TimmWrapperModel(config), KCFIImageProcessor()
    # timm's own random weights: transformers' deviation of 0.02 is too little for depth-wise convolutions
    tower.timm_model = timm.create_model(config.architecture, num_classes=0, **size)
    trainer = Trainer(
        model=Namer(tower),
        args=TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.01,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=20,
            remove_unused_columns=False,
            seed=arguments.seed,
            dataloader_num_workers=1,
        ),
        train_dataset=Dates(SyntheticDataset(16 * max(1, arguments.steps), seed=arguments.seed), processor),
    )
    if arguments.steps:
        trainer.train()
    tower.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    write_tower_card(arguments.output, "python -m kcfi.training.towers.vision_tower")


if __name__ == "__main__":
    main()
