"""KCFITrainer: `transformers.Trainer` for two losses, and evaluation by generated captions and predicted masks."""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, is_deepspeed_zero3_enabled, is_tensorboard_available
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput, denumpify_detensorize
from transformers.utils import logging

from kcfi.files import name_some
from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from kcfi.processing import NO_LABEL, InputError, KCFIProcessor
from kcfi.training.arguments import KCFITrainingArguments, field_defaults
from kcfi.training.collator import IGNORED, KCFICollator, check_packing, training_inputs
from kcfi.training.data.order import EpochSampler
from kcfi.training.data.readable_pairs import ReadablePairs
from kcfi.training.data.rows import Position, RowDataset, RowStream
from kcfi.training.data.shards import ShardDataset
from kcfi.training.dwa import TASKS, DynamicWeightAverage
from kcfi.training.feature_cache import FeatureCache
from kcfi.training.liger import caption_loss_of
from kcfi.training.lora import save_start
from kcfi.training.scoring.evaluate import CAPTION_METRICS, PairPrediction, Scores, predict, sample_sheet
from kcfi.training.sharing.model_card import CARD_FILE, card_of_run
from kcfi.training.zero import gathered, whole_weights

logger = logging.get_logger(__name__)

# Settings of Trainer that a loop of captions and masks cannot follow, and what there is instead.
REFUSED = {
    "compute_loss_func": "the losses are those of eq. 8 and 9; override KCFITrainer.compute_loss for others",
    "label_smoothing_factor": "the caption loss is that of eq. 8, with hard targets",
    "average_tokens_across_devices": "both losses are means over all ranks; leave it true",
    "use_cache": "a training step generates nothing; leave it false",
    "preprocess_logits_for_metrics": "evaluation keeps no logits; compute_metrics gets captions and masks",
    "prediction_loss_only": "evaluation scores captions and masks; evaluate less often (eval_steps) or on fewer pairs",
    "include_for_metrics": "compute_metrics gets captions, masks and what they are compared with, no more",
    "batch_eval_metrics": "caption scores are those of a whole split, so compute_metrics is called once",
    "eval_accumulation_steps": "captions and masks leave the device after every batch",
    "eval_do_concat_batches": "compute_metrics gets lists of pairs, not arrays of batches",
    "eval_use_gather_object": "captions and masks are always gathered as objects",
    "bf16_full_eval": "it would round the weights that train; `bf16: true` evaluates in autocast",
    "fp16_full_eval": "it would round the weights that train; `fp16: true` evaluates in autocast",
    "train_sampling_strategy": "the order of the pairs is a function of seed and epoch, so that runs resume exactly",
    "auto_find_batch_size": "steps of a size that failed would stay in the dynamic weights; set "
    "per_device_train_batch_size",
    "parallelism_config": "every process is counted as a rank with pairs of its own; take `deepspeed: zero3`",
    "remove_unused_columns": "the collator reads what the model does not know; leave it false",
    "label_names": "captions and masks are the labels; leave it out",
}

STATE_FILE = "kcfi_state.json"  # in a checkpoint: dynamic weight average, pairs and captions seen


def check_settings(args: KCFITrainingArguments, options: Mapping[str, Any]) -> None:
    """Refuse the settings of `REFUSED` where they differ from their default.

    Args:
        args: settings.
        options: of `Trainer.__init__`.

    Raises:
        InputError: names the setting, why it is refused and what there is instead.
    """
    given, defaults = {**vars(args), **options}, field_defaults()
    for name, reason in REFUSED.items():
        if given.get(name) != defaults.get(name):
            raise InputError(f"KCFITrainer takes no {name}={given[name]!r}: {reason}.")


def check_best_metric(args: KCFITrainingArguments, eval_dataset: Any) -> None:
    """Refuse to choose checkpoints by a score of captions where the evaluation split has none.

    Args:
        args: settings.
        eval_dataset: examples; read up to the first one with captions. Not looked into where it has no length.

    Raises:
        InputError: names a score to use instead.
    """
    best = (args.metric_for_best_model or "").removeprefix("eval_")
    if args.eval_strategy == "no" or best not in CAPTION_METRICS or isinstance(eval_dataset, dict):
        return
    if not hasattr(eval_dataset, "__len__"):
        return
    if not any(eval_dataset[index]["captions"] for index in range(len(eval_dataset))):
        raise InputError(
            f"metric_for_best_model={best} is a score of captions, and no pair of the evaluation split has a "
            "sentence: choose the best checkpoint by its masks (--metric_for_best_model mask_f1)."
        )


def check_cacheable(args: KCFITrainingArguments, collator: KCFICollator) -> None:
    """Refuse a feature cache whose entries would be wrong, or never be read again.

    Raises:
        InputError: names the setting in its way.
    """
    reason = ""
    if args.train_vision_tower:
        reason = "the vision tower changes in training: add train_vision_tower: false"
    elif collator.augment:
        reason = "augment gives an image other pixels at every visit: leave it out"
    elif is_deepspeed_zero3_enabled():
        reason = "ZeRO-3 splits the tower's weights, by which entries are named: take zero2"
    if reason:
        raise InputError(f"feature_cache: {reason}; or leave out feature_cache.")


def freeze(model: KCFIForConditionalGeneration, args: KCFITrainingArguments) -> list[nn.Module]:
    """Switch gradients off where `args` say so, after loading, since loading switches them on.

    A language model with adapters stays in training mode: all but them is frozen already, and they may have dropout.
    With `args.bf16_language_model` its frozen weights become bf16.

    Returns:
        What must run in evaluation mode: frozen modules that have dropout, and batch norms, whose statistics would
        depend on how an optimizer step is cut into micro-batches and ranks (a tower brings its own). All else stays in
        training mode, because transformers checkpoints activations only there.
    """
    frozen = []
    if not args.train_language_model and not model._hf_peft_config_loaded:
        frozen += [model.model.language_model, model.lm_head]
    if not args.train_vision_tower:
        frozen.append(model.model.vision_tower)
    for module in frozen:
        module.requires_grad_(False)
    if args.bf16_language_model:
        cast_frozen_language_model(model, torch.bfloat16)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [module for module in frozen if _has_dropout(module)] + norms


def cast_frozen_language_model(model: KCFIForConditionalGeneration, dtype: torch.dtype) -> None:
    """Give the frozen weights of the language model another type; not its buffers: rotary frequencies need fp32."""
    for weight in [*model.model.language_model.parameters(), *model.lm_head.parameters()]:
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)


def _has_dropout(module: nn.Module) -> bool:
    """Whether a module drops anything out: by its layers, or by its config (attention reads the config)."""
    settings = module.config.to_dict() if isinstance(module, PreTrainedModel) else {}
    rates = [value for name, value in settings.items() if "dropout" in name or "pdrop" in name]
    rates += [layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)]
    return any(rates)


def parameter_groups(
    model: KCFIForConditionalGeneration, args: KCFITrainingArguments, decayed: list[str]
) -> list[dict[str, Any]]:
    """Optimizer groups: (all else, vision tower, projector) x (with, without weight decay), empty ones left out.

    Args:
        model: after `freeze`.
        args: the three learning rates and the weight decay.
        decayed: names of the parameters that decay (no biases, no norms).

    Returns:
        Groups with "name", "params", "lr" and "weight_decay"; every trainable parameter is in exactly one.
    """
    rates = {
        "": args.learning_rate,
        "vision_": args.vision_learning_rate,
        "projector_": args.projector_learning_rate,
    }
    parts = {"vision_": model.model.vision_tower, "projector_": model.model.projector}
    owner = {id(parameter): name for name, part in parts.items() for parameter in part.parameters()}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 may have split it
            wide = sum(size > 1 for size in shape) > 1  # unlike batch norms and layer scales, which have other names
            decays = name in decayed and wide
            groups.setdefault((owner.get(id(parameter), ""), decays), []).append(parameter)

    placed = [id(parameter) for parameters in groups.values() for parameter in parameters]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(placed) == sorted(trainable), "every trainable parameter must be in exactly one optimizer group"
    return [
        {
            "name": f"{part}learning_rate",
            "params": parameters,
            "lr": rates[part],
            "weight_decay": args.weight_decay if decay else 0.0,
        }
        for (part, decay), parameters in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def evaluation_losses(model: KCFIForConditionalGeneration, batch: dict[str, Any], features: Any) -> torch.Tensor:
    """Losses of a batch in evaluation, per pair and on its first caption.

    Args:
        model: in evaluation mode.
        batch: of `KCFICollator` in evaluation mode.
        features: what `get_image_features` returned for it.

    Returns:
        (B, 4): sum of the caption loss, its tokens (0 for a pair without captions), sum of the mask loss, its pixels.
    """
    answers = batch["labels"]  # (B,T')
    attention_mask = torch.cat([batch["attention_mask"], (answers != IGNORED).long()], dim=1)
    logits = model(
        input_ids=torch.cat([batch["input_ids"], answers.clamp(min=0)], dim=1),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),  # prompts are padded on the left
        mm_encoder_outputs={"image": features},
        logits_to_keep=answers.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]  # (B,T',vocabulary)
    losses = F.cross_entropy(logits.float().transpose(1, 2), answers, ignore_index=IGNORED, reduction="none")
    columns = [losses.sum(dim=1), (answers != IGNORED).sum(dim=1)]
    if features.mask_logits is not None and "mask_labels" in batch:
        masks = batch["mask_labels"]
        losses = F.cross_entropy(features.mask_logits.float(), masks, ignore_index=NO_LABEL, reduction="none")
        columns += [losses.sum(dim=(1, 2)), (masks != NO_LABEL).sum(dim=(1, 2))]
    else:
        columns += [torch.zeros_like(columns[0])] * 2
    return torch.stack([column.float() for column in columns], dim=1)


def as_eval_prediction(pairs: Sequence[PairPrediction]) -> EvalPrediction:
    """What `compute_metrics` receives, see `KCFITrainer`."""
    predictions: Any = [pair.caption for pair in pairs], [pair.mask for pair in pairs]
    labels: Any = [pair.references for pair in pairs], [pair.true_mask for pair in pairs]
    return EvalPrediction(predictions=predictions, label_ids=labels)


def trackers(report_to: Sequence[str]) -> list[str]:
    """The trackers of `report_to`; TensorBoard, being the default, is left out where it is not installed."""
    names = [name for name in report_to if name != "none"]
    if "tensorboard" in names and not is_tensorboard_available():
        names.remove("tensorboard")
        logger.warning('TensorBoard is not installed: no curves are written (`pip install "kcfi[tensorboard]"`).')
    return names


def peak_memory(device: torch.device) -> float | None:
    """Most memory that this process has held so far, in MiB: of the GPU, else main memory (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def training_pairs(pairs: Any, args: KCFITrainingArguments) -> Any:
    """What `KCFITrainer` trains on: data of `datasets` as examples, and all else as it is.

    Raises:
        InputError: the columns do not fit, an iterable that is none of `datasets`, or a setting that needs a length or
            a second look, which a stream does not give.
    """
    if isinstance(pairs, datasets.Dataset):
        return RowDataset(pairs)
    if isinstance(pairs, datasets.IterableDataset):
        pairs = RowStream(pairs)
    if not isinstance(pairs, IterableDataset):
        return pairs
    if not isinstance(pairs, RowStream):
        raise InputError(
            f"train_dataset is a {type(pairs).__name__}, whose order cannot be shared out and resumed: give a "
            "map-style data set, or a datasets.IterableDataset (`IterableDataset.from_generator`)."
        )
    if args.max_steps <= 0:
        raise InputError(f"max_steps={args.max_steps}: a streamed train_dataset has no length; say how many steps.")
    if args.max_unreadable or args.dwa == "epoch":
        setting = f"max_unreadable={args.max_unreadable}" if args.max_unreadable else "dwa=epoch"
        raise InputError(f"{setting} needs the length of train_dataset, and a stream has none.")
    if args.ignore_data_skip:
        raise InputError("ignore_data_skip: a resumed stream goes on where it was; leave it out.")
    for setting in ("eval_strategy", "save_strategy"):
        if getattr(args, setting) == "epoch":
            logger.warning(f"{setting}=epoch means at the end: a streamed train_dataset has no epochs. Choose steps.")
    pairs.rank, pairs.ranks = args.process_index, args.world_size
    return pairs


def evaluation_pairs(pairs: Any) -> Any:
    """What `KCFITrainer` evaluates on: data of `datasets` as map-style examples, alone or in a dictionary."""
    if isinstance(pairs, dict):
        return {name: evaluation_pairs(part) for name, part in pairs.items()}
    if isinstance(pairs, RowStream):
        return RowDataset(*pairs.source)
    return RowDataset(pairs) if isinstance(pairs, datasets.Dataset | datasets.IterableDataset) else pairs


def stream_batch(collator: KCFICollator, examples: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """A batch of one reader of a `RowStream`, with "reader" (its number) and "position" (behind the last pair).

    Empty if the run that is resumed was trained on it.
    """
    read = [example for example in examples if example is not None]
    if not read:
        return {}
    worker = get_worker_info()
    return {**collator(read), "reader": worker.id if worker else 0, "position": read[-1]["position"]}


class KCFITrainer(Trainer):
    """Trains a KCFI model on captions and masks.

    - **Caption loss** (eq. 8): mean over the caption tokens of the whole optimizer step, all micro-batches and ranks.
    - **Mask loss** (eq. 9): mean over the labelled pixels of the whole optimizer step, likewise. So the gradients do
      not depend on how a step is cut into micro-batches and ranks. A pair without captions adds to the mask loss
      alone, one without a mask to the caption loss alone.
    - **Weights** of the two: dynamic weight averaging, or 1 and 1 (`args.dwa`).
    - **Evaluation** generates captions and masks and scores them (`eval_s_m`, `eval_mask_f1`, ...); `eval_loss` is the
      sum of the two losses on the first caption of every pair. A few pairs are drawn each time, into
      `samples/step-N.png` and for TensorBoard.
    - **`compute_metrics`** is called once per evaluation, on the main process, with an `EvalPrediction` of four lists
      with an entry per pair, in the order of the data set: `predictions` is (captions, masks), `label_ids` is
      (references, true masks). A caption is a str, the references are a list of them, empty where there are none; a
      mask is an array (H, W) of class ids at the size of the images, uint8, 255 = not seen or no label, or None. What
      it returns joins the other scores: {"x": 1} is logged as `eval_x`.
    - **Resume**: order of pairs (`order.py`), instructions, captions and augmentation drawn are functions of (seed,
      epoch); the dynamic weight average is part of the checkpoint. Another number of ranks, batch size or accumulation
      is taken between two epochs and refused within one, as another number of loader workers is for shards.
    - **Processor**: its `tile_size` becomes the side of the images of the first step.
    - **Data** of `datasets` is taken as `load_dataset` returns it, with the columns of `shards.FEATURES`. A training
      set that streams needs `max_steps`: it has no epochs, and "epoch" of `eval_strategy` is the end (`rows.py`).

    Args:
        model: a `KCFIForConditionalGeneration`; it is frozen here, as `args` say.
        args: settings.
        data_collator: for training; evaluation uses the same settings in evaluation mode.
        **kwargs: of `transformers.Trainer`: `train_dataset`, `eval_dataset`, `processing_class`, `callbacks`, ...

    Raises:
        InputError: a setting of `REFUSED`, several GPUs in one process, a checkpoint metric that needs Java or
            sentences where there are none, or several captions per pair with a language model that cannot keep them
            apart, data whose columns do not fit, or a setting that streamed data does not have.
    """

    args: KCFITrainingArguments
    model: KCFIForConditionalGeneration
    data_collator: KCFICollator
    processing_class: KCFIProcessor
    optimizer: torch.optim.Optimizer
    train_dataset: Any

    loss_is_scaled_for_ga = True  # compute_loss divides by the totals of all micro-batches

    def __init__(
        self,
        model: KCFIForConditionalGeneration,
        args: KCFITrainingArguments,
        data_collator: KCFICollator,
        **kwargs: Any,
    ) -> None:
        check_settings(args, kwargs)
        if args.n_gpu > 1:
            raise InputError(
                f"{args.n_gpu} GPUs in one process (DataParallel) would average the losses wrongly: start one process "
                f"per GPU, `torchrun --nproc_per_node {args.n_gpu} -m kcfi_cli train ...`, or choose one GPU by "
                "CUDA_VISIBLE_DEVICES=0."
            )
        self.meteor = shutil.which("java") is not None
        if args.eval_strategy != "no" and args.metric_for_best_model in ("s_m", "meteor") and not self.meteor:
            raise InputError(
                f"metric_for_best_model={args.metric_for_best_model} needs METEOR, and so Java, which is not on the "
                "PATH: install a Java runtime, or choose the best checkpoint by another score "
                "(--metric_for_best_model cider_d)."
            )
        if args.eval_strategy != "no" and not self.meteor:
            logger.warning("Java is not on the PATH: evaluation leaves out METEOR and S_m*.")
        if data_collator.captions_per_pair > 1:
            prompt = len(data_collator.processor.encode_prompt())
            captions = data_collator.captions_per_pair * args.generation_max_new_tokens
            with gathered(model.model.language_model):
                check_packing(model.model.language_model.eval(), prompt + captions)
        self.evaluated = freeze(model, args)
        if args.neftune_noise_alpha is not None and model.model.language_model in self.evaluated:
            raise InputError(
                "neftune_noise_alpha adds noise in training mode, and this frozen language model is kept out of it "
                "for its dropout: leave it out, or `train_language_model: true`."
            )
        self.caption_loss = caption_loss_of(model, args)
        self.feature_cache = None
        if args.feature_cache:
            check_cacheable(args, data_collator)
            self.feature_cache = FeatureCache(model.model, args.feature_cache)
        args.report_to = trackers(args.report_to)
        kwargs["train_dataset"] = training_pairs(kwargs.get("train_dataset"), args)
        kwargs["eval_dataset"] = evaluation_pairs(kwargs.get("eval_dataset"))
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        if self.eval_dataset is not None:
            check_best_metric(args, self.eval_dataset)
        if args.max_unreadable:
            self.train_dataset = ReadablePairs(self.train_dataset)
        self.evaluation_collator = data_collator.for_evaluation()
        self.dwa = None
        if args.dwa != "none":
            window = args.dwa_window if args.dwa == "window" else 1  # "epoch": known when training begins
            self.dwa = DynamicWeightAverage(args.dwa_temperature, window)
        self.tile_known = False
        self.pairs_seen = 0
        self.captions_seen = 0
        self.unreadable = 0  # pairs of this epoch
        self.positions: dict[int, Position] = {}  # of the readers of a stream on this rank
        self._weights = dict.fromkeys(TASKS, 1.0)
        self._step_losses = dict.fromkeys(TASKS, 0.0)
        self._logged: dict[str, list[float]] = {task: [] for task in TASKS}
        self._log_started, self._log_pairs, self._log_captions = time.perf_counter(), 0, 0
        self.add_callback(_EpochCallback(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(KCFIProgressCallback)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's; until it ends the model has the caption loss and the feature cache of the settings."""
        model = self.model
        model.caption_loss_function = self.caption_loss  # type: ignore[method-assign]
        if self.feature_cache is not None:
            model.model.get_stage_features = self.feature_cache  # type: ignore[method-assign]
        try:
            return super().train(*args, **kwargs)
        finally:
            del model.caption_loss_function
            if self.feature_cache is not None:
                del model.model.get_stage_features

    # Data

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        pairs = self._pairs(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(pairs, ShardDataset):
            lanes = self.args.world_size * max(1, self.args.dataloader_num_workers)
            self.sampler = EpochSampler(pairs.sizes, seed, lanes, self._train_batch_size)
        else:
            self.sampler = EpochSampler([len(pairs)], seed)
        return self.sampler

    def _pairs(self, train_dataset: Dataset[Any] | None = None) -> Any:
        """The training pairs, without those who stand in for unreadable ones."""
        pairs: Any = self.train_dataset if train_dataset is None else train_dataset
        return pairs.pairs if isinstance(pairs, ReadablePairs) else pairs

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's; for a stream one that reads this rank's part of it."""
        if not isinstance(self.train_dataset, RowStream):
            return super().get_train_dataloader()
        self.positions.clear()
        self.train_dataset.positions = {}
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=partial(stream_batch, self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        # "one process": accelerate would share out among the ranks once more, or read on the first alone
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )
        return prepared

    def get_eval_dataloader(self, eval_dataset: str | Dataset[Any] | None = None) -> DataLoader[Any]:
        """Trainer's, with prompts and references instead of training rows."""
        with self._evaluation_collator():
            return super().get_eval_dataloader(evaluation_pairs(eval_dataset))

    def get_test_dataloader(self, test_dataset: Dataset[Any]) -> DataLoader[Any]:
        """Trainer's, with prompts and references instead of training rows."""
        with self._evaluation_collator():
            return super().get_test_dataloader(evaluation_pairs(test_dataset))

    @contextmanager
    def _evaluation_collator(self) -> Iterator[None]:
        training, self.data_collator = self.data_collator, self.evaluation_collator
        try:
            yield
        finally:
            self.data_collator = training

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or `args.optim`) over `parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.args, self.get_decay_parameter_names(self.model))
            optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.model
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # Losses

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """Fetch the micro-batches of an optimizer step and count, over all ranks, what their losses are divided by.

        Raises:
            InputError: more pairs of this epoch than `max_unreadable` could not be read, or the step has nothing to
                learn from: neither a caption, nor a mask that the model has a head for.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(5, dtype=torch.int64, device=device)
        sides = [side for batch in batches for size in batch.pop("sizes") for side in size]
        if not self.tile_known:  # `Describer` cuts larger images into tiles of this size
            self.data_collator.processor.tile_size = max(sides)
            self.tile_known = True
        for batch in batches:
            if "position" in batch:
                self.positions[batch.pop("reader")] = batch.pop("position")
            unreadable = batch.pop("unreadable", [])
            for error in unreadable:
                logger.warning(f"{error} Another pair stands in for it.")
            masks = batch.get("mask_labels") if self.model.config.use_change_detection_head else None
            pixels = 0 if masks is None else (masks != NO_LABEL).sum().item()
            tokens = (batch["labels"] != IGNORED).sum().item()
            captions = batch["segment_ids"].amax(dim=1).sum().item()
            counts += torch.tensor([tokens, pixels, len(batch["filenames"]), captions, len(unreadable)], device=device)
        tokens, pixels, pairs, captions, broken = self.accelerator.reduce(counts, "sum").tolist()
        self.labels = {"caption": tokens, "mask": pixels}
        if not tokens and not pixels:
            names = [name for batch in batches for name in batch["filenames"]]
            raise InputError(
                f"Optimizer step {self.state.global_step + 1} has no caption, and no mask for a change detection "
                f"head: there is nothing to learn from {name_some(names)}."
            )
        self.unreadable += broken
        if self.unreadable and self.unreadable > self.args.max_unreadable * len(self.train_dataset):
            raise InputError(
                f"{self.unreadable} of {len(self.train_dataset)} training pairs could not be read in this epoch "
                f"(named above), more than max_unreadable={self.args.max_unreadable} allows. Run `kcfi data "
                "check` on the data set."
            )
        self.pairs_seen += pairs
        self.captions_seen += captions
        self._log_pairs += pairs
        self._log_captions += captions
        return batches, torch.tensor(max(tokens, 1), device=device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """This micro-batch's share of the weighted loss of its optimizer step, times the number of ranks.

        Ranks average their gradients, hence the factor; see the class for the rule.

        Raises:
            FloatingPointError: the loss is not finite; names step, losses and pairs. The weights are not changed.
        """
        filenames = inputs["filenames"]
        inputs = training_inputs(inputs, self.model.model.language_model)
        for module in self.evaluated:
            module.eval()
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, use_cache=False, skip_logits=True)
        losses = {"caption": outputs.caption_loss}
        if outputs.mask_loss is not None:
            share = (inputs["mask_labels"] != NO_LABEL).sum() / max(self.labels["mask"], 1)
            losses["mask"] = outputs.mask_loss * share
        total = sum(self._weights[task] * loss for task, loss in losses.items())
        if self.is_deepspeed_enabled and "mask" not in losses and outputs.mask_logits is not None:
            total = total + 0 * outputs.mask_logits.sum()  # ZeRO adds up buckets: all ranks need the same gradients
        if not torch.isfinite(total):
            values = ", ".join(f"{task} loss {loss.item()}" for task, loss in losses.items())
            raise FloatingPointError(
                f"Optimizer step {self.state.global_step + 1}: {values}. Pairs of the batch: {', '.join(filenames)}. "
                "Training stopped before the weights changed; a lower learning rate or bf16 instead of fp16 may help."
            )
        for task, loss in losses.items():
            self._step_losses[task] += loss.detach()
        total = total * self.accelerator.num_processes
        return (total, outputs) if return_outputs else total

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Trainer's; behind the last micro-batch of an optimizer step the dynamic weight average moves on."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._finish_step()
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's.

        Raises:
            FloatingPointError: the gradient is not finite (under DeepSpeed, which steps before this, it has skipped
                the step). Not in fp16, whose scaler skips such steps and goes on.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and self.accelerator.mixed_precision != "fp16" and not math.isfinite(norm):
            raise FloatingPointError(
                f"Optimizer step {self.state.global_step + 1}: the losses are finite, but the norm of their gradient "
                f"is {float(norm)}. Training stopped before the weights changed; a lower learning rate may help."
            )
        return norm

    def _finish_step(self) -> None:
        sums = torch.tensor([float(self._step_losses[task]) for task in TASKS], device=self.args.device)
        losses = dict(zip(TASKS, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
        for task, other in (("mask", "captions"), ("caption", "masks")):
            if not self.labels[task]:
                del losses[task]
                if self.state.global_step == 0 and self.is_world_process_zero():
                    logger.warning(
                        f"The first step has no {task} loss: until one comes, {other} are trained alone, with "
                        "weight 1."
                    )
        for task, loss in losses.items():
            self._logged[task].append(loss)
        self._step_losses = dict.fromkeys(TASKS, 0.0)
        self._step_weights = self._weights
        # groups of an optimizer that the caller made have no names
        self._step_rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups if "name" in group}
        if self.dwa is not None:
            self.dwa.update(losses)
            self._weights = self.dwa.weights

    # Log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a line of training: both losses and weights, learning rates, counts, speed, peak memory in MiB."""
        if "loss" in logs:
            for task, losses in self._logged.items():
                if losses:
                    logs[f"{task}_loss"] = sum(losses) / len(losses)
                    logs[f"{task}_weight"] = self._step_weights[task]
                losses.clear()
            logs |= self._step_rates
            logs |= {"pairs": self.pairs_seen, "captions": self.captions_seen}
            seconds = time.perf_counter() - self._log_started
            logs["pairs_per_second"] = self._log_pairs / seconds
            logs["captions_per_second"] = self._log_captions / seconds
            memory = peak_memory(self.args.device)
            if memory is not None:
                logs["peak_memory_mib"] = memory
            self._log_started, self._log_pairs, self._log_captions = time.perf_counter(), 0, 0
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's; its time does not count in pairs/s of training."""
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._log_started += time.perf_counter() - started
        return metrics

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Generate a caption and a mask for every pair, score them, and compute both losses.

        Returns:
            `predictions` is {filename: caption}; `metrics` holds the scores x 100 over all pairs, and what
            `compute_metrics` made of them (see the class).
        """
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        scores = Scores(self.data_collator.mask_classes)
        pairs: list[PairPrediction] = []  # for compute_metrics
        sums = torch.zeros(4, device=self.args.device)
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.accelerator.autocast():
                features = model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True)
                tokens = self.args.generation_max_new_tokens
                predictions = predict(model, self.processing_class, batch, features, tokens)
                losses = evaluation_losses(model, batch, features)
            # gathering drops the pairs that the loader repeats to fill the last batches of all ranks
            predictions = self.accelerator.gather_for_metrics(predictions, use_gather_object=True)
            scores.update(predictions)
            if self.compute_metrics is not None and self.is_world_process_zero():
                pairs += predictions
            sums += self.accelerator.gather_for_metrics(losses).sum(dim=0)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        caption_sum, tokens, mask_sum, pixels = sums.tolist()
        metrics: dict[str, float] = {}
        if self.is_world_process_zero():  # METEOR starts Java: once
            metrics = scores.metrics(self.meteor)
            if self.compute_metrics is not None:
                metrics |= denumpify_detensorize(self.compute_metrics(as_eval_prediction(pairs)))
        [metrics] = broadcast_object_list([metrics])
        parts = {"caption_loss": (caption_sum, tokens), "mask_loss": (mask_sum, pixels)}
        means = {name: total / count for name, (total, count) in parts.items() if count}
        metrics |= {**means, "loss": sum(means.values())}
        if metric_key_prefix == "eval" and self.is_world_process_zero():
            self._show(sample_sheet(dataloader.dataset, scores.samples))
        return EvalLoopOutput(
            predictions=cast(Any, scores.captions),
            label_ids=None,
            metrics={
                f"{metric_key_prefix}_{name.removeprefix(f'{metric_key_prefix}_')}": value
                for name, value in metrics.items()
            },
            num_samples=len(scores.captions),
        )

    def _show(self, samples: Image.Image) -> None:
        """Write a picture of sample captions and masks into the folder of the run, and hand it to TensorBoard."""
        file = Path(str(self.args.output_dir)) / "samples" / f"step-{self.state.global_step}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        samples.save(file)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                pixels = np.asarray(samples)
                callback.tb_writer.add_image("eval/samples", pixels, self.state.global_step, dataformats="HWC")

    # Hub

    def create_model_card(  # type: ignore[override]  # all else is read from the run
        self, *, model_name: str | None = None, license: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        """Write README.md into `output_dir`, the card that `kcfi push` makes; `push_to_hub` calls it.

        Args:
            model_name: where the trainer has no `hub_model_id` (None: the name of `output_dir`).
            license: the Hub's name of the weights' licence (None: that of what the run began with, where all agree;
                otherwise the card states none).
            tags: further ones.
        """
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            repo_id = self.hub_model_id or model_name or folder.name
            card = card_of_run(folder, repo_id, self.model.config, vars(self.state), license=license, tags=tags)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CARD_FILE).write_text(card, encoding="utf-8")

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.model._hf_peft_config_loaded and self.args.should_save:
            with whole_weights(self.args):
                save_start(self.model, output_dir or str(self.args.output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._saves_whole_weights():
            self._load_weights(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._saves_whole_weights():
            self._load_weights(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _saves_whole_weights(self) -> bool:
        return isinstance(self.model, PreTrainedModel) and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _load_weights(self, folder: str) -> None:
        """Load a checkpoint through `from_pretrained`, which knows the parameter names of the file.

        Trainer copies by name and skips what it does not find: the blocks of a ViT have other names in files.
        """
        loaded = type(self.model).from_pretrained(folder, dtype="auto")
        self.model.load_state_dict(loaded.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the file that comes next says that the checkpoint is complete

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        positions = gather_object([self.positions]) if isinstance(self.train_dataset, RowStream) else []
        if self.args.should_save:
            state: dict[str, Any] = {
                "pairs": self.pairs_seen,
                "captions": self.captions_seen,
                "order": self._order(),
                "other_steps": self.other_steps,
                "positions": positions,  # of the readers of a stream, per rank
            }
            if self.dwa is not None:
                state["dwa"] = self.dwa.state_dict()
            (Path(output_dir) / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _order(self) -> dict[str, int]:
        """What the place of a step in its epoch depends on, beside the seed and the data.

        Loader workers read in turn: only shards and streams have an order that is made for their number.
        """
        order = {
            "processes": self.args.world_size,
            "batch": self._train_batch_size,
            "accumulation": self.args.gradient_accumulation_steps,
        }
        if isinstance(self._pairs(), ShardDataset | RowStream):
            order["workers"] = self.args.dataloader_num_workers
        return order

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Trainer's, and the place to go on from where earlier epochs had optimizer steps of another size.

        Steps are counted on, since checkpoints are named by them: `other_steps` of them are more (or, negative, fewer)
        than this run would have made until here.

        Returns:
            Epochs to skip, and batches of the next one to skip.

        Raises:
            InputError: the run was stopped within an epoch, and this one would visit other pairs in the rest of it.
        """
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.other_steps = 0
        if resume_from_checkpoint is None:
            return place
        state = _read_state(resume_from_checkpoint)
        if isinstance(self.train_dataset, RowStream) and not state["positions"]:
            raise InputError(
                f"{resume_from_checkpoint} was written by a run whose data did not stream: resume it with those."
            )
        self.other_steps = state["other_steps"]
        if state["order"] != self._order():
            epochs = float(self.state.epoch or 0)
            if not epochs.is_integer() or self.args.max_steps > 0 or self.is_deepspeed_enabled:
                raise InputError(
                    f"{resume_from_checkpoint} was written by a run with {state['order']}, this one has "
                    f"{self._order()}: pairs would be lost or visited twice. Resume with the same (torchrun "
                    "--nproc_per_node, per_device_train_batch_size, gradient_accumulation_steps, "
                    "dataloader_num_workers), or from a checkpoint at the end of an epoch (without max_steps and "
                    "DeepSpeed)."
                )
            self.other_steps = self.state.global_step - int(epochs) * num_update_steps_per_epoch
        if self.other_steps:
            epoch, step = divmod(self.state.global_step - self.other_steps, num_update_steps_per_epoch)
            place = epoch, step * self.args.gradient_accumulation_steps
            self.state.max_steps += self.other_steps
        return place

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = _read_state(checkpoint)
        if state["other_steps"] != self.other_steps:  # the same share of the schedule, in steps of the new size
            cast(Any, self.lr_scheduler).last_epoch = self.state.global_step - self.other_steps
        if isinstance(self.train_dataset, RowStream):
            positions = state["positions"][self.args.process_index]
            self.positions = {int(reader): Position(*position) for reader, position in positions.items()}
            self.train_dataset.positions = dict(self.positions)
        self.pairs_seen, self.captions_seen = state["pairs"], state["captions"]
        if self.dwa is not None and "dwa" in state:
            self.dwa.load_state_dict(state["dwa"])
            self._weights = self.dwa.weights


def _read_state(checkpoint: str) -> dict[str, Any]:
    """What `KCFITrainer` wrote beside Trainer's own state."""
    state: dict[str, Any] = json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))
    return state


class _EpochCallback(TrainerCallback):
    """Tells the sampler and the collator the epoch, the dynamic weight average the steps of one.

    It also takes activation checkpointing, which Trainer has just switched on in the whole model, from the tower that
    `activation_checkpointing_towers` leaves out.
    """

    def __init__(self, trainer: KCFITrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._log_started = time.perf_counter()
        parts = self.trainer.model.model
        others = {"vision": parts.language_model, "language": parts.vision_tower}
        if args.activation_checkpointing_towers in others:
            others[args.activation_checkpointing_towers].activation_checkpointing_disable()
        if self.trainer.dwa is not None and args.dwa == "epoch":
            batches = len(kwargs["train_dataloader"])
            self.trainer.dwa.window = math.ceil(batches / args.gradient_accumulation_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = int(state.epoch or 0)
        if not isinstance(self.trainer.train_dataset, RowStream):  # whose pairs bring their own along
            self.trainer.sampler.epoch = epoch
        self.trainer.data_collator.set_epoch(epoch)
        self.trainer.unreadable = 0


class KCFIProgressCallback(ProgressCallback):
    """Trainer's progress bar with the two losses and pairs/s behind it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the line of the log, and the newest figures behind the bar."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs is not None and "loss" in logs:
            shown = {"caption_loss": "caption", "mask_loss": "mask", "pairs_per_second": "pairs/s"}
            self.training_bar.set_postfix({text: f"{logs[name]:.3g}" for name, text in shown.items() if name in logs})
