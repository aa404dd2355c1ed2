"""Evaluation: caption and mask every pair of a split, score them, and show the best, median and worst ones.

```
kcfi evaluate --model kcfi-tiny --dataset synthetic --split test --num_pairs 20 --output runs/results.json
```
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocoevalcap.rouge.rouge import Rouge
from torch.utils.data import DataLoader
from tqdm import tqdm

from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from kcfi.models import load, validation_dtype
from kcfi.pictures import contact_sheet, overlay
from kcfi.processing import INSTRUCTIONS, NO_LABEL, Describer, InputError, KCFIProcessor
from kcfi.processing.describer_kcfi import check_finite, write_captions
from kcfi.training.data.levir_cc import warn_of_levir_cd
from kcfi.training.data.pairs import MaskClasses, class_ids, num_classes
from kcfi.training.feature_cache import FeatureCache
from kcfi.training.load import load_pairs
from kcfi.training.scoring.metrics import CAPTION_SCORES, MaskScores, require_java, results
from kcfi.training.synthetic.dataset import SyntheticDataset
from kcfi.training.synthetic.material_library import attributions

CAPTION_METRICS = (*CAPTION_SCORES, "cider_d_changed", "change_accuracy")  # entries of `flat_scores` about captions
SAMPLES = 3  # pairs of each kind, changed and unchanged, that are shown at every evaluation of a training


@dataclass
class PairPrediction:
    """What the model says of one pair, beside what is true.

    Args:
        filename, changed, references: of the data set; no references where it has masks alone.
        caption: generated.
        mask: predicted class ids (H, W), uint8, at the size of the images; 255 = not seen; None without a head.
        true_mask: class ids (H, W), uint8; None without labels.
    """

    filename: str
    changed: bool
    references: list[str]
    caption: str
    mask: NDArray[np.uint8] | None
    true_mask: NDArray[np.uint8] | None


def check_classes(model: KCFIForConditionalGeneration, mask_classes: MaskClasses) -> None:
    """Refuse masks that are mapped to other classes than the model predicts.

    Raises:
        InputError: with both numbers.
    """
    if model.config.num_change_classes != num_classes(mask_classes):
        raise InputError(
            f"mask_classes={mask_classes} has {num_classes(mask_classes)} classes, the model "
            f"num_change_classes={model.config.num_change_classes}: make them agree."
        )


def predict(
    model: Any, processor: KCFIProcessor, batch: dict[str, Any], features: Any, max_new_tokens: int
) -> list[PairPrediction]:
    """Caption and mask the pairs of a batch of a training's validation: what `Describer` says of pairs of its tile.

    Args:
        model: in evaluation mode.
        processor: its processor.
        batch: of `KCFICollator` in evaluation mode, on the model's device.
        features: what `get_image_features` returned for it.
        max_new_tokens: longest caption, in tokens.

    Raises:
        FloatingPointError: logits of a caption or a mask are not finite.
    """
    captions, _ = write_captions(model, processor, features, batch["input_ids"], max_new_tokens=max_new_tokens)
    masks: list[Any] = [None] * len(captions)
    if features.mask_logits is not None:
        check_finite(features.mask_logits, "mask")
        maps = processor.post_process_masks(features.mask_logits, batch["sizes"])
        masks = [ids.cpu().numpy() for ids in maps]
    columns = (batch["filenames"], batch["changed"], batch["references"], captions, masks, batch["true_masks"])
    return [PairPrediction(*row) for row in zip(*columns, strict=True)]


def true_mask(example: Mapping[str, Any], mask_classes: MaskClasses) -> NDArray[np.uint8] | None:
    """Class ids (H, W) of an example's mask; None without one."""
    mask = example["mask"]
    return None if mask is None else class_ids(mask, mask_classes, example["filename"])


class Scores:
    """Collects predictions, batch by batch, and scores them; the trainer and `evaluate_model` consume it.

    A pair without references counts in the scores of masks alone, one without a mask in those of captions.
    `samples` are the first `SAMPLES` pairs that changed and as many that did not, each behind its position.
    """

    def __init__(self, mask_classes: MaskClasses) -> None:
        self.samples: list[tuple[int, PairPrediction]] = []
        self.captions: dict[str, str] = {}
        self.references: list[list[str]] = []
        self.changed: list[bool] = []
        self.masks = MaskScores(mask_classes)

    def update(self, predictions: Iterable[PairPrediction]) -> None:
        """Count a batch."""
        for pair in predictions:
            if pair.filename in self.captions:
                raise InputError(f"{pair.filename} occurs more than once in this split: `kcfi data check` names all.")
            if sum(sample.changed == pair.changed for _, sample in self.samples) < SAMPLES:
                self.samples.append((len(self.references), pair))
            self.captions[pair.filename] = pair.caption
            self.references.append(pair.references)
            self.changed.append(pair.changed)
            if pair.mask is not None and pair.true_mask is not None:
                self.masks.update(torch.from_numpy(pair.mask), torch.from_numpy(pair.true_mask))

    def results(self, model: str, dataset: str, split: str, meteor: bool) -> dict[str, Any]:
        """All scores in the schema of results.json."""
        captions = list(self.captions.values())
        return results(
            captions,
            self.references,
            self.changed,
            model=model,
            dataset=dataset,
            split=split,
            meteor=meteor,
            mask=self.masks.compute(),
        )

    def metrics(self, meteor: bool) -> dict[str, float]:
        """The scores over all pairs as one flat row for the trainer's log, see `flat_scores`."""
        return flat_scores(self.results(model="", dataset="", split="", meteor=meteor))


def flat_scores(report: Mapping[str, Any]) -> dict[str, float]:
    """The scores over all pairs as one flat row, x 100: "s_m", "change_accuracy", "mask_f1", "mask_f1_road", ...

    Args:
        report: what results.json holds.
    """
    row: dict[str, Any] = {}
    if "captions" in report:
        row = {**report["captions"]["all"], "change_accuracy": report["change_accuracy"]}
        row["cider_d_changed"] = report["captions"]["changed"]["cider_d"]
    if "mask" in report:
        row |= {f"mask_f1_{name}": value for name, value in report["mask"]["f1"].items()}
        row["mask_f1"] = row.pop("mask_f1_change")
        row["mask_mean_iou"] = report["mask"]["mean_iou"]
    return {name: value for name, value in row.items() if value is not None}


def evaluate_model(
    model: str,
    dataset: str,
    split: str,
    output: str | Path,
    num_pairs: int | None = None,
    seed: int = 0,
    mask_classes: MaskClasses | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    meteor: bool = True,
    columns: Mapping[str, str] | None = None,
    materials: str | None = None,
    pair_mix: Mapping[str, float] | None = None,
    feature_cache: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    instruction: str | None = None,
    tile: int | None = None,
    num_workers: int | None = None,
    dataset_revision: str | None = None,
) -> dict[str, Any]:
    """Score a model on a split and write results.json, predictions.json and pairs.png into one folder.

    Args:
        model: folder, Hub id, or "kcfi-tiny".
        dataset: "synthetic", a folder in the layout of LEVIR-CC / LEVIR-MCI, or what `datasets` opens (`load_pairs`).
        split: "train", "val" or "test".
        output: the results file; predictions and picture sheet are written beside it.
        num_pairs: how many of the first pairs (None: all).
        seed: of the synthetic scenes.
        mask_classes: as the model was trained (None: "road_building" for a model of three classes, else "change").
        batch_size: pairs per batch.
        max_new_tokens: longest caption, in tokens.
        meteor: False does without Java and leaves METEOR and S_m* out.
        columns: names of the columns of what `datasets` opens, where they differ from ours.
        materials: library of `kcfi data materials` that "synthetic" draws with.
        pair_mix: kinds of synthetic pairs, see `SyntheticDataset`.
        feature_cache: folder where the vision tower's features of every image are kept, see `FeatureCache`.
        device: see `kcfi.models.load`.
        dtype: of the weights, see `kcfi.models.load`; None also takes the autocast of the run's validation.
        instruction: what the model is asked (None: the first of Table I).
        tile: see `Describer`.
        num_workers: processes that read images (None: 2 beside a GPU, else none).
        dataset_revision: branch, tag or commit of a data set on the Hub (None: the newest).

    Returns:
        What results.json holds; of synthetic pairs also "synthetic": how they were drawn.

    Raises:
        FileNotFoundError: no such data set, or no Java with `meteor`.
        InputError: the classes of masks and model differ, or a file of the data set cannot be used.
    """
    if meteor:
        require_java()  # now, not after an hour of captions
    pairs = load_pairs(dataset, split, num_pairs, seed, columns, materials, pair_mix, dataset_revision)
    network, processor = load(model, device, dtype)
    if feature_cache:
        network.model.stage_cache = FeatureCache(network.model, feature_cache)
    mask_classes = mask_classes or ("road_building" if network.config.num_change_classes == 3 else "change")
    check_classes(network, mask_classes)
    autocast = None if dtype else validation_dtype(model, network.device)
    settings = (tile, batch_size, instruction or INSTRUCTIONS[0], autocast)
    describer = Describer(network, processor, *settings, max_new_tokens=max_new_tokens)
    if num_workers is None:
        num_workers = 0 if network.device.type == "cpu" else 2
    loader: Any = DataLoader(cast(Any, pairs), batch_size=batch_size, collate_fn=list, num_workers=num_workers)

    scores, predictions = Scores(mask_classes), []
    for batch in tqdm(loader, desc="pairs", unit="batch"):
        images = [(example["image_before"], example["image_after"]) for example in batch]
        reports = describer.describe_pairs(images)
        described = [
            PairPrediction(
                example["filename"],
                example["changed"],
                example["captions"],
                report.caption,
                report.mask,
                true_mask(example, mask_classes),
            )
            for example, report in zip(batch, reports, strict=True)
        ]
        scores.update(described)
        predictions += described
    warn_of_levir_cd(scores.captions)

    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    captions = json.dumps(scores.captions, indent=2, ensure_ascii=False)
    output.with_name("predictions.json").write_text(captions + "\n", encoding="utf-8")
    report = scores.results(model, dataset, split, meteor)
    if isinstance(pairs, SyntheticDataset):
        sources = attributions(materials) if materials else []
        report["synthetic"] = {"seed": seed, "pair_mix": pairs.mix, "materials": sources}
    picture_sheet(pairs, predictions).save(output.with_name("pairs.png"))
    part = output.with_suffix(".part")  # the results come last and complete: `kcfi ablate` takes them for the end
    part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    part.replace(output)
    return report


def pair_score(pair: PairPrediction) -> float:
    """Score of one pair x 100, to sort pairs by: mean of ROUGE-L and F1 of the changed pixels, of what it has."""
    scores = []
    if pair.references:
        words = [sentence.lower().strip(" .") for sentence in pair.references]
        scores.append(100 * float(Rouge().calc_score([pair.caption.lower().strip(" .") or "-"], words)))
    if pair.mask is not None and pair.true_mask is not None:
        counted = (pair.mask != NO_LABEL) & (pair.true_mask != NO_LABEL)
        predicted, true = pair.mask[counted] > 0, pair.true_mask[counted] > 0
        changed_pixels = int(predicted.sum() + true.sum())
        scores.append(200 * int((predicted & true).sum()) / changed_pixels if changed_pixels else 100.0)
    return sum(scores) / max(len(scores), 1)


def telling_pairs(predictions: Sequence[PairPrediction], count: int) -> list[tuple[str, int]]:
    """Choose the best, the median and the worst pairs by `pair_score`, changed and unchanged pairs apart.

    Args:
        predictions: of a data set.
        count: pairs of each kind.

    Returns:
        ("changed, best", position in `predictions`), ...; changed pairs first, from the best to the worst.
    """
    scores = [pair_score(pair) for pair in predictions]
    chosen = []
    for changed in (True, False):
        order = [index for index, pair in enumerate(predictions) if pair.changed == changed]
        order.sort(key=lambda index: -scores[index])
        middle = max(0, (len(order) - count) // 2)
        kinds = {"best": order[:count], "median": order[middle : middle + count], "worst": order[-count:]}
        for kind, indices in kinds.items():
            chosen += [(f"{'changed' if changed else 'unchanged'}, {kind}", index) for index in indices]
    return chosen


def picture_sheet(pairs: Any, predictions: Sequence[PairPrediction], count: int = 2) -> Image.Image:
    """Draw the pairs that `telling_pairs` chooses.

    Args:
        pairs: the data set.
        predictions: one per pair, in its order.
        count: pairs of each kind.
    """
    chosen = telling_pairs(predictions, count)
    kinds = [f"{kind} ({pair_score(predictions[index]):.0f})" for kind, index in chosen]
    return draw_pairs(pairs, [(index, predictions[index]) for _, index in chosen], kinds)


def sample_sheet(pairs: Any, samples: Sequence[tuple[int, PairPrediction]]) -> Image.Image:
    """Draw the samples of `Scores`: the same pairs at every evaluation.

    Args:
        pairs: the data set.
        samples: position in it and prediction.
    """
    samples = sorted(samples, key=lambda sample: not sample[1].changed)
    return draw_pairs(pairs, samples, ["changed" if pair.changed else "unchanged" for _, pair in samples])


def draw_pairs(pairs: Any, chosen: Sequence[tuple[int, PairPrediction]], titles: Sequence[str]) -> Image.Image:
    """Draw predictions.

    Args:
        pairs: the data set.
        chosen: position in it and prediction.
        titles: one for each, to stand before the file name.

    Returns:
        Rows of before, after, true mask, predicted mask, with the caption and a reference at their right.
    """
    rows, captions = [], []
    for (index, pair), title in zip(chosen, titles, strict=True):
        example = pairs[index]
        after = example["image_after"]
        masked = [
            Image.new("RGB", after.size) if mask is None else overlay(after, np.where(mask == NO_LABEL, 0, mask))
            for mask in (pair.true_mask, pair.mask)
        ]
        rows.append([example["image_before"], after, *masked])
        true = pair.references[0] if pair.references else "(no sentence)"
        captions.append(f"{title}: {pair.filename}\npredicted: {pair.caption}\ntrue: {true}")
    return contact_sheet(rows, captions, ["before", "after", "true mask", "predicted mask"])
