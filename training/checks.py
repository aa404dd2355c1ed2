"""Settings that a training cannot follow, refused before it begins."""

import shutil
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from kcfi.processing import InputError
from kcfi.training.arguments import KCFITrainingArguments, field_defaults
from kcfi.training.collator import KCFICollator, check_packing
from kcfi.training.scoring.evaluate import CAPTION_METRICS
from kcfi.training.zero import gathered

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
    "enable_jit_checkpoint": "SIGTERM always saves a checkpoint and stops; leave it out",
    "auto_find_batch_size": "steps of a size that failed would stay in the dynamic weights; set "
    "per_device_train_batch_size",
    "parallelism_config": "every process is counted as a rank with pairs of its own; take `deepspeed: zero3`",
    "remove_unused_columns": "the collator reads what the model does not know; leave it false",
    "label_names": "captions and masks are the labels; leave it out",
}


def check_settings(args: KCFITrainingArguments, options: Mapping[str, Any]) -> None:
    """Refuse the settings of `REFUSED` where they differ from their default.

    Args:
        args: settings.
        options: of `Trainer.__init__`.

    Raises:
        InputError: names the setting, why it is refused and what there is instead; or several GPUs in one process.
    """
    given, defaults = {**vars(args), **options}, field_defaults()
    for name, reason in REFUSED.items():
        if given.get(name) != defaults.get(name):
            raise InputError(f"KCFITrainer takes no {name}={given[name]!r}: {reason}.")
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs in one process (DataParallel) would average the losses wrongly: start one process "
            f"per GPU, `torchrun --nproc_per_node {args.n_gpu} -m kcfi_cli train ...`, or choose one GPU by "
            "CUDA_VISIBLE_DEVICES=0."
        )


def find_java(args: KCFITrainingArguments) -> bool:
    """Whether METEOR, a Java program, can be computed; without, evaluation leaves it out.

    Raises:
        InputError: checkpoints are to be chosen by it.
    """
    found = shutil.which("java") is not None
    if args.eval_strategy != "no" and not found:
        if args.metric_for_best_model in ("s_m", "meteor"):
            raise InputError(
                f"metric_for_best_model={args.metric_for_best_model} needs METEOR, and so Java, which is not on the "
                "PATH: install a Java runtime, or choose the best checkpoint by another score "
                "(--metric_for_best_model cider_d)."
            )
        logger.warning("Java is not on the PATH: evaluation leaves out METEOR and S_m*.")
    return found


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


def check_captions_per_pair(
    model: KCFIForConditionalGeneration, args: KCFITrainingArguments, collator: KCFICollator
) -> None:
    """Refuse several captions per pair where the language model cannot keep them apart.

    Raises:
        InputError: of `check_packing`.
    """
    if collator.captions_per_pair > 1:
        prompt = len(collator.processor.encode_prompt())
        captions = collator.captions_per_pair * args.generation_max_new_tokens
        with gathered(model.model.language_model):
            check_packing(model.model.language_model.eval(), prompt + captions)


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


def check_objective(args: KCFITrainingArguments, pairs: Any) -> None:
    """Refuse what self-critical training cannot follow.

    Args:
        args: settings.
        pairs: to train on, of `training_pairs`.

    Raises:
        InputError: names the setting in its way.
    """
    if args.objective != "scst":
        return
    reason = ""
    if args.dwa != "none":
        reason = (
            f"dwa={args.dwa} compares a loss with what it was before, and one of advantages is as often below 0 as "
            "above: set dwa: none, which adds the mask loss with weight 1"
        )
    elif args.use_liger_kernel:
        reason = "use_liger_kernel gives all tokens of a step one weight: leave it out"
    elif args.deepspeed or args.fsdp:
        reason = "a model that is split among processes was never let write captions while it trains: leave out " + (
            "deepspeed" if args.deepspeed else "fsdp"
        )
    elif isinstance(pairs, IterableDataset):
        reason = (
            "CIDEr-D weighs words by the captions of all pairs, which a stream does not know: set streaming: false"
        )
    if reason:
        raise InputError(f"objective=scst: {reason}.")


def check_noise(model: KCFIForConditionalGeneration, args: KCFITrainingArguments, evaluated: list[nn.Module]) -> None:
    """Refuse NEFTune where the language model is among the modules that run in evaluation mode (`freeze`).

    Raises:
        InputError: it is.
    """
    if args.neftune_noise_alpha is not None and model.model.language_model in evaluated:
        raise InputError(
            "neftune_noise_alpha adds noise in training mode, and this frozen language model is kept out of it "
            "for its dropout: leave it out, or `train_language_model: true`."
        )
