"""KCFITrainer: `transformers.Trainer` for two losses, and evaluation by generated captions and predicted masks."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import datasets
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from timm.optim import Muon
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, is_tensorboard_available
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, ProgressCallback
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    EvalPrediction,
    TrainOutput,
    denumpify_detensorize,
)
from transformers.utils import logging

from kcfi.files import name_some
from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from kcfi.processing import NO_LABEL, InputError, KCFIProcessor
from kcfi.training.arguments import KCFITrainingArguments
from kcfi.training.average import WeightAverage
from kcfi.training.checkpoints import UNFINISHED, begin, check_space, flush, publish, rotate, writing
from kcfi.training.checks import (
    check_best_metric,
    check_cacheable,
    check_captions_per_pair,
    check_noise,
    check_objective,
    check_settings,
    find_java,
)
from kcfi.training.collator import IGNORED, KCFICollator, training_inputs
from kcfi.training.data.order import EpochSampler
from kcfi.training.data.readable_pairs import ReadablePairs
from kcfi.training.data.rows import Position, RowDataset, RowStream
from kcfi.training.data.scenes import column_of
from kcfi.training.data.shards import ShardDataset
from kcfi.training.dwa import DynamicWeightAverage
from kcfi.training.feature_cache import FeatureCache
from kcfi.training.finite import StepNumbers
from kcfi.training.liger import caption_loss_of
from kcfi.training.lora import save_start
from kcfi.training.losses import LossBalance, evaluation_losses
from kcfi.training.parameters import freeze, parameter_groups
from kcfi.training.scoring.evaluate import PairPrediction, Scores, predict, sample_sheet
from kcfi.training.scst import SelfCritic, policy_loss
from kcfi.training.sharing.model_card import CARD_FILE, card_of_run
from kcfi.training.stopping import StopCallback, outliving
from kcfi.training.throughput import Throughput, peak_memory
from kcfi.training.zero import whole_weights

logger = logging.get_logger(__name__)


STATE_FILE = "kcfi_state.json"  # in a checkpoint: dynamic weight average, pairs and captions seen


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
    - **Captions that the model draws** take the place of the caption loss with `args.objective` "scst" (`scst.py`).
    - **Average**: with `args.ema_decay` evaluation sees an average of the weights, and the run ends with it.
    - **Weights** of the two: dynamic weight averaging, or 1 and 1 (`args.dwa`).
    - **Evaluation** generates captions and masks and scores them (`eval_s_m`, `eval_mask_f1`, ...); `eval_loss` is the
      sum of the two losses on the first caption of every pair. A few pairs are drawn each time, into
      `samples/step-N.png` and for TensorBoard.
    - **`compute_metrics`** is called once per evaluation, on the main process, with an `EvalPrediction` of four lists
      with an entry per pair, in the order of the data set: `predictions` is (captions, masks), `label_ids` is
      (references, true masks). A caption is a str, the references are a list of them, empty where there are none; a
      mask is an array (H, W) of class ids at the size of the images, uint8, 255 = not seen or no label, or None. What
      it returns joins the other scores: {"x": 1} is logged as `eval_x`.
    - **Checkpoints** are complete or invisible (`checkpoints.py`). SIGTERM ends a training behind its step, with one.
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
        kwargs["train_dataset"] = training_pairs(kwargs.get("train_dataset"), args)
        check_objective(args, kwargs["train_dataset"])
        self.meteor = find_java(args)
        check_captions_per_pair(model, args, data_collator)
        self.evaluated = freeze(model, args)
        check_noise(model, args, self.evaluated)
        self.caption_loss = caption_loss_of(model, args)
        self.feature_cache = None
        if args.feature_cache:
            check_cacheable(args, data_collator)
            self.feature_cache = FeatureCache(model.model, args.feature_cache)
        args.report_to = trackers(args.report_to)
        kwargs["eval_dataset"] = evaluation_pairs(kwargs.get("eval_dataset"))
        data_collator.sampled = args.objective == "scst"
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        if self.eval_dataset is not None:
            check_best_metric(args, self.eval_dataset)
        if args.max_unreadable:
            self.train_dataset = ReadablePairs(self.train_dataset)
        self.evaluation_collator = data_collator.for_evaluation()
        dwa = None
        if args.dwa != "none":
            window = args.dwa_window if args.dwa == "window" else 1  # "epoch": known when training begins
            dwa = DynamicWeightAverage(args.dwa_temperature, window)
        self.balance = LossBalance(dwa)
        self.average: WeightAverage | None = None  # while it trains
        self.evaluating = False
        self.critic: SelfCritic | None = None  # made when training begins, from the captions of all training pairs
        self.throughput = Throughput()
        self.step_rates: dict[str, float] = {}  # learning rates of the last step
        self.tile_known = False
        self.unreadable = 0  # pairs of this epoch
        self.positions: dict[int, Position] = {}  # of the readers of a stream on this rank
        self.numbers = StepNumbers()
        self.resumed: dict[str, Any] | None = None  # what the checkpoint of this run held
        self.add_callback(EpochCallback(self))
        self.add_callback(TowerCheckpointingCallback())
        self.stop = StopCallback()
        self.add_callback(self.stop)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(KCFIProgressCallback)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's; until it ends the model has the caption loss and the feature cache of the settings.

        SIGTERM ends it behind a step, with a checkpoint: then `stopped` is true.

        Raises:
            OSError: the disk has no room for what will be saved.
        """
        model = self.model
        if self.args.should_save:
            self._check_space()
        if self.args.objective == "scst":
            collator = self.data_collator
            limits = (collator.captions_per_pair, self.args.generation_max_new_tokens)
            captions = column_of(self.train_dataset, "captions")
            self.critic = SelfCritic(model, collator.processor, captions, *limits, seed=self.args.seed)
        if self.args.ema_decay:
            self.average = WeightAverage(model, self.args.ema_decay)
        before = model.caption_loss_function, model.model.stage_cache
        model.caption_loss_function = self.caption_loss
        if self.feature_cache is not None:
            model.model.stage_cache = self.feature_cache
        self.throughput.stop()
        try:
            with self.stop.listening():
                output = super().train(*args, **kwargs)
            if self.average is not None and not self.stopped:
                self.average.exchange()
            return output
        finally:
            self.average = None
            model.caption_loss_function, model.model.stage_cache = before

    def _check_space(self) -> None:
        weights = sum(weight.nbytes for weight in self.model.parameters())
        checkpoint = weights
        if not self.args.save_only_model:  # Adam keeps two numbers per weight
            checkpoint += 2 * sum(weight.nbytes for weight in self.model.parameters() if weight.requires_grad)
        if self.args.ema_decay:
            checkpoint += sum(weight.nbytes for weight in self.model.parameters() if weight.requires_grad)
        if self.args.save_strategy == "no":
            checkpoint = 0
        check_space(Path(str(self.args.output_dir)), checkpoint, self.args.save_total_limit, weights)

    @property
    def stopped(self) -> bool:
        """Whether SIGTERM ended the training before its last step."""
        return self.stop.agreed and self.state.global_step < self.state.max_steps

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
        return outliving(prepared)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        return outliving(super()._get_dataloader(*args, **kwargs))

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
        """AdamW (or `args.optim`, or Muon) over `parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.args, self.get_decay_parameter_names(self.model))
            if self.args.muon:
                betas, eps = (self.args.adam_beta1, self.args.adam_beta2), self.args.adam_epsilon
                self.optimizer = Muon(groups, betas=betas, eps=eps, nesterov=True, adjust_lr_fn="match_rms_adamw")
                return self.optimizer
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
        self.throughput.start()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.critic is not None:
            with self.accelerator.autocast():
                batches = [self.critic.write(batch, self.state.global_step) for batch in batches]
            self.critic.finish(lambda sums: self.accelerator.reduce(sums, "sum"), device)
        counts = torch.zeros(6, dtype=torch.int64, device=device)
        counts[5] = int(self.stop.received)
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
            counts[:5] += torch.tensor(
                [tokens, pixels, len(batch["filenames"]), captions, len(unreadable)], device=device
            )
        tokens, pixels, pairs, captions, broken, stops = self.accelerator.reduce(counts, "sum").tolist()
        self.stop.agreed = stops > 0
        self.balance.start(tokens, pixels)
        names = [name for batch in batches for name in batch["filenames"]]
        self.numbers.start(self.state.global_step + 1, names)
        if not tokens and not pixels:
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
        self.throughput.count(pairs, captions)
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
        if self.critic is None:
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch, use_cache=False, skip_logits=True)
        else:
            labels, advantages = inputs.pop("labels"), inputs.pop("advantages")
            outputs = model(**inputs, use_cache=False)
            outputs.caption_loss = policy_loss(outputs.logits, labels, advantages, cast(Any, num_items_in_batch))
        losses = self.balance.share(outputs, inputs.get("mask_labels"))
        total = self.balance.weigh(losses)
        if self.is_deepspeed_enabled and "mask" not in losses and outputs.mask_logits is not None:
            total = total + 0 * outputs.mask_logits.sum()  # ZeRO adds up buckets: all ranks need the same gradients
        self.numbers.check_losses(losses, total, filenames)
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
                the step). In fp16 only once the scale of the loss is that small that it is not to blame; DeepSpeed
                ends a run of fp16 itself.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        scaler = self.accelerator.scaler
        if norm is not None and not (self.is_deepspeed_enabled and self.accelerator.mixed_precision == "fp16"):
            self.numbers.check_gradient(float(norm), scaler.get_scale() if scaler else 0.0)
        return norm

    def _finish_step(self) -> None:
        # groups of an optimizer that the caller made have no names
        self.step_rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups if "name" in group}
        missing = self.balance.finish(lambda sums: self.accelerator.reduce(sums, "sum"), self.args.device)
        if self.state.global_step == 0 and self.is_world_process_zero():
            for task in missing:
                other = "captions" if task == "mask" else "masks"
                logger.warning(
                    f"The first step has no {task} loss: until one comes, {other} are trained alone, with weight 1."
                )

    # Log

    def resume_log(self) -> None:
        """The losses between the last line of the log and the checkpoint that is resumed count in the next line."""
        if self.resumed is None:
            return
        sums, ranks = self.resumed["loss"], self.args.world_size
        self._tr_loss += sums[self.args.process_index] if len(sums) == ranks else fmean(sums)
        self._total_loss_scalar -= fmean(sums)  # which is of the steps of this process alone
        self._globalstep_last_logged = self.resumed["logged_step"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a line of training: both losses and weights, learning rates, counts, speed, peak memory in MiB."""
        if "loss" in logs:
            rewards = self.critic.logs() if self.critic is not None else {}
            logs |= {**self.balance.logs(), **rewards, **self.step_rates, **self.throughput.logs()}
            memory = peak_memory(self.args.device)
            if memory is not None:
                logs["peak_memory_mib"] = memory
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, of the average where there is one; its time does not count in pairs/s of training."""
        if self.evaluating:  # Trainer evaluates each of several data sets through this method again
            return super().evaluate(*args, **kwargs)
        averaged = nullcontext() if self.average is None else self.average.in_place()
        self.evaluating = True
        try:
            with self.throughput.paused(), averaged:
                return super().evaluate(*args, **kwargs)
        finally:
            self.evaluating = False

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

        Raises:
            FloatingPointError: logits of a caption or a mask are not finite; names step and pairs.
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
                try:
                    predictions = predict(model, self.processing_class, batch, features, tokens)
                except FloatingPointError as error:
                    raise FloatingPointError(
                        f"Evaluation behind optimizer step {self.state.global_step}: {error} Pairs of the batch: "
                        f"{', '.join(batch['filenames'])}."
                    ) from error
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

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's; `save_strategy: best` also saves what SIGTERM stops."""
        return super()._determine_best_metric(metrics, trial) or self.stop.agreed

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's, complete or invisible (`checkpoints.py`).

        Raises:
            OSError: it could not be written; says what is left to resume from.
        """
        run, step = Path(self._get_output_dir(trial)), self.state.global_step
        checkpoint = run / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        self.store_flos()
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == checkpoint or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        with writing(run, step):
            if self.args.should_save:
                begin(run)
            self.accelerator.wait_for_everyone()
            folder = str(run / UNFINISHED)
            self.save_model(folder, _internal_call=True)
            if self.average is not None and self.args.should_save:
                self.average.save(folder)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(folder)
                self._save_scaler(folder)
                self._save_rng_state(folder)
            if self.args.should_save:
                states: dict[str, list[Any]] = {}
                for callback in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(callback, ExportableState):
                        states.setdefault(type(callback).__name__, []).append(callback.state())
                self.state.stateful_callbacks = cast(Any, states)
                self.state.save_to_json(str(run / UNFINISHED / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()  # all ranks have written
            flush(run / UNFINISHED)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(run, checkpoint, step)
                rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

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
        if self.stopped:
            return  # who stops it will not wait for long
        if self._saves_whole_weights():
            self._load_weights(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()
        if self.average is not None:
            self.average.load(str(self.state.best_model_checkpoint))

    def _saves_whole_weights(self) -> bool:
        return isinstance(self.model, PreTrainedModel) and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _load_weights(self, folder: str) -> None:
        """Load a checkpoint through `from_pretrained`, which knows the parameter names of the file.

        Trainer copies by name and skips what it does not find: the blocks of a ViT have other names in files.
        """
        loaded = type(self.model).from_pretrained(folder, dtype="auto")
        self.model.load_state_dict(loaded.state_dict())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        positions = gather_object([self.positions]) if isinstance(self.train_dataset, RowStream) else []
        loss = gather_object([self._tr_loss.item()])
        if self.args.should_save:
            state: dict[str, Any] = {
                "pairs": self.throughput.pairs,
                "captions": self.throughput.captions,
                "order": self._order(),
                "other_steps": self.other_steps,
                "muon": self.args.muon,
                "positions": positions,  # of the readers of a stream, per rank
                "loss": loss,  # summed since the last line of the log, per rank
                "logged_step": self._globalstep_last_logged,
                **self.balance.state_dict(),
                **(self.critic.state_dict() if self.critic is not None else {}),
            }
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
        self.other_steps, self.resumed = 0, None
        if self.balance.dwa is not None and self.args.dwa == "epoch":
            self.balance.dwa.window = num_update_steps_per_epoch
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
        if self.state.global_step >= self.state.max_steps:  # stopped between its last checkpoint and its end
            return num_train_epochs, 0  # where an epoch has steps left, Trainer would take one more
        return place

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, and what `_save_optimizer_and_scheduler` wrote beside it.

        Raises:
            InputError: the checkpoint is of another optimizer, with or without Muon.
        """
        state = _read_state(checkpoint) if checkpoint else {}
        if state.get("muon", self.args.muon) != self.args.muon:  # older checkpoints do not tell
            raise InputError(
                f"{checkpoint} was written by a run with muon={state['muon']}, this one has muon={self.args.muon}: an "
                "optimizer cannot go on from the state of another. Resume with the same."
            )
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if state["other_steps"] != self.other_steps:  # the same share of the schedule, in steps of the new size
            cast(Any, self.lr_scheduler).last_epoch = self.state.global_step - self.other_steps
        if isinstance(self.train_dataset, RowStream):
            positions = state["positions"][self.args.process_index]
            self.positions = {int(reader): Position(*position) for reader, position in positions.items()}
            self.train_dataset.positions = dict(self.positions)
        self.throughput.count(state["pairs"] - self.throughput.pairs, state["captions"] - self.throughput.captions)
        self.balance.load_state_dict(state)
        if self.critic is not None:
            self.critic.load_state_dict(state)
        if self.average is not None:
            self.average.load(checkpoint)
        self.resumed = state


def _read_state(checkpoint: str) -> dict[str, Any]:
    """What `KCFITrainer` wrote beside Trainer's own state."""
    state: dict[str, Any] = json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))
    return state


class EpochCallback(TrainerCallback):
    """Tells sampler and collator the epoch, on which their choices depend; unreadable pairs count per epoch.

    Behind every step it has the weights looked at and averaged.
    """

    def __init__(self, trainer: KCFITrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where Trainer has begun its sum of losses at the checkpoint, though the next line of the log spans more."""
        self.trainer.resume_log()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first pair of an epoch is drawn."""
        epoch = int(state.epoch or 0)
        if not isinstance(self.trainer.train_dataset, RowStream):  # whose pairs bring their own along
            self.trainer.sampler.epoch = epoch
        self.trainer.data_collator.set_epoch(epoch)
        self.trainer.unreadable = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the step is counted, logged or saved."""
        self.trainer.numbers.check_weights(self.trainer.model)
        if self.trainer.average is not None:
            self.trainer.average.update(state.global_step)


class TowerCheckpointingCallback(TrainerCallback):
    """Takes activation checkpointing from the tower that `activation_checkpointing_towers` leaves out.

    Trainer has just switched it on in the whole model.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Behind Trainer's own preparations."""
        others = {"vision": model.model.language_model, "language": model.model.vision_tower}
        if args.activation_checkpointing_towers in others:
            others[args.activation_checkpointing_towers].activation_checkpointing_disable()


class KCFIProgressCallback(ProgressCallback):
    """Trainer's progress bar with the two losses and pairs/s behind it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the line of the log, and the newest figures behind the bar."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs is not None and "loss" in logs:
            shown = {"caption_loss": "caption", "mask_loss": "mask", "pairs_per_second": "pairs/s"}
            self.training_bar.set_postfix({text: f"{logs[name]:.3g}" for name, text in shown.items() if name in logs})
