"""Run by test_trainer under torchrun: two ranks train, score, predict and save; rank 0 writes what they found.

torchrun --nproc_per_node 2 two_ranks.py FOLDER NAME SETTINGS [CHECKPOINT]
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object

from kcfi import KCFIForConditionalGeneration
from kcfi.processing import KCFIProcessor
from kcfi.training.collator import KCFICollator
from kcfi.training.losses import evaluation_losses
from kcfi.training.scoring.evaluate import predict
from kcfi.training.trainer import KCFITrainer
from tests.training.conftest import Pairs
from tests.training.test_trainer import TWO_RANKS, Gradients, arguments, break_gradients, losses

folder, name, settings, *checkpoint = sys.argv[1:]
folder, settings = Path(folder), json.loads(settings)
broken = settings.pop("broken", False)
settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, **TWO_RANKS, **settings}
args = arguments(folder / name, per_device_eval_batch_size=2, **settings)  # ZeRO-3: before the model
if settings.get("deepspeed"):
    from deepspeed import init_distributed

    init_distributed()  # accelerate does it on GPUs alone
os.environ["PATH"] = ""  # without Java, which takes seconds to start; DeepSpeed has compiled what it needs
model = KCFIForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
processor = KCFIProcessor.from_pretrained(folder / "model")
keep = Gradients()
collator = KCFICollator(processor, captions_per_pair=2, seed=3)
trainer = KCFITrainer(
    model,
    args,
    collator,
    train_dataset=Pairs(
        8, masks="some", captions="some"
    ),  # 4 on each rank, some micro-batches without mask or caption
    eval_dataset=Pairs(
        5, captions="some"
    ),  # the sampler repeats pairs to fill the last batches; they must not count twice
    processing_class=processor,
    callbacks=[keep],
    compute_metrics=lambda prediction: {"pairs": len(prediction.predictions[0])},
)
results = {}
if broken:
    break_gradients(model)
    try:
        trainer.train()
    except FloatingPointError as error:
        results["error"] = str(error)
else:
    trainer.train(*checkpoint)
    metrics = trainer.evaluate()
    scores = {name: value for name, value in metrics.items() if "runtime" not in name and "second" not in name}
    assert all(scores == other for other in gather_object([scores]))  # both ranks know what rank 0 scored
    batch = collator.for_evaluation()([Pairs(5)[index] for index in range(5)])
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"])
        results["losses"] = evaluation_losses(model, batch, features)
        predictions = predict(model, processor, batch, features, 16)
    results["captions"] = [pair.caption for pair in predictions]
    results["masks"] = [torch.from_numpy(pair.mask) for pair in predictions]
    results["gradients"] = {name.removeprefix("module."): gradient for name, gradient in keep.first.items()}
    results["log"] = json.dumps(losses(trainer))
    results |= metrics
trainer.save_model()
if trainer.is_world_process_zero():
    torch.save(results, folder / f"{name}.pt")
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
