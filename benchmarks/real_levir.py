"""What a model is worth on real pairs of LEVIR-CC with captions and building masks: the measure of this project.

    python benchmarks/real_levir.py PAIRS --split test [--model kcfi-tiny] [--output DIR] [--before DIR] [--no-meteor]

PAIRS is what `kcfi evaluate --dataset` takes; masks label buildings only (0 / 255), and a model's roads are not
punished. Prints, as lines of JSON, all x 100:

- `captions`: S_m* and its parts for all, changed and unchanged pairs, told apart (changed or not, read off the
  sentence), and the same of the constant sentence;
- `building`: F1, IoU, precision and recall of the building class over all pixels, and of marking everything;
- `calibration`: expected calibration error of the building mask and of the changed probability of pairs, and for
  every alarm rate that the model knows: unchanged pairs that were called changed, changed pairs that were found;
- `claims`: what sentences say against masks and references, in numbers of pairs (see `claims`), and how many sentences
  repeat a phrase.

With `--before`, the `--output` of the model that this one was made from, a last line says what was gained and lost: a
training for CIDEr-D (`objective: scst`) may gain CIDEr-D and lose truth.

`--output` gets the same as real_levir.json, every pair's sentence, false claims and wrong building pixels as
pairs.json, the 60 worst pairs as pictures (before, after, truth, predicted), and reliability.png where matplotlib is
installed.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import kcfi  # noqa: F401 (registers the Auto classes)
from kcfi.files import read_json
from kcfi.models import load
from kcfi.pictures import contact_sheet, overlay
from kcfi.processing import Describer, InputError
from kcfi.processing.describer_kcfi import UNCHANGED
from kcfi.processing.places_kcfi import tells_of_change
from kcfi.training.load import load_pairs
from kcfi.training.scoring.calibrate import RATES, Reliability
from kcfi.training.scoring.evaluate import PairPrediction, true_mask
from kcfi.training.scoring.metrics import MaskScores, results

WORST = 60
PHRASE = 4  # words; 52 of LEVIR-CC's 50,385 sentences repeat as many
BUILDINGS = re.compile(
    r"\b(house|building|villa|mansion|hall|construction|residential|facilit|room|warehouse|factory)"
)
GONE = re.compile(r"\b(remov\w+|disappear\w*|demolish\w*|destroyed|vanish\w*|cleared|cut down|replaced by|gone)\b")
BUILT = re.compile(
    r"\b(buil[dt]|rebuilt|new|newly|appear\w*|emerge\w*|constructed|shows? up|erected|added|replac\w+|completed"
    r"|developed)\b"
)
PLACES = {
    "top": (slice(0, 1), slice(0, 3)),
    "bottom": (slice(2, 3), slice(0, 3)),
    "left": (slice(0, 3), slice(0, 1)),
    "right": (slice(0, 3), slice(2, 3)),
}


def claims(pair: PairPrediction) -> list[str]:
    """The false claims of a sentence, by kind.

    "missed": the pair changed, the sentence says it did not; "false alarm": the other way round; "no such object": it
    tells of buildings where mask and references have none; "wrong direction": it tells of removal alone where no
    reference does, or of building alone where all references tell of removal alone; "wrong place": a clause that names
    buildings and no road names a side of the image in whose third nothing is marked in the true mask.
    """
    caption, references = pair.caption.lower(), [sentence.lower() for sentence in pair.references]
    if not tells_of_change(caption):
        return ["missed"] if pair.changed else []
    if not pair.changed:
        return ["false alarm"]
    found = []
    truth = pair.true_mask
    assert truth is not None
    if BUILDINGS.search(caption) and not truth.any() and not any(BUILDINGS.search(s) for s in references):
        found.append("no such object")
    built, gone = bool(BUILT.search(caption)), bool(GONE.search(caption))
    only_gone = [bool(GONE.search(s)) and not BUILT.search(s) for s in references]
    if (gone and not built and not any(GONE.search(s) for s in references)) or (built and not gone and all(only_gone)):
        found.append("wrong direction")
    clauses = [part for part in caption.split(" and ") if BUILDINGS.search(part) and "road" not in part]
    if truth.any():
        height, width = truth.shape
        thirds = truth[: height // 3 * 3, : width // 3 * 3].reshape(3, height // 3, 3, width // 3).sum((1, 3))
        words = " ".join(clauses).replace("upper", "top").replace("lower", "bottom")
        if any(re.search(rf"\b{word}\b", words) and not thirds[part].any() for word, part in PLACES.items()):
            found.append("wrong place")
    return found


def repeats(caption: str) -> bool:
    """Whether a phrase of `PHRASE` words stands twice in a sentence: "a road is built and a road is built"."""
    words = caption.lower().split()
    phrases = [tuple(words[start : start + PHRASE]) for start in range(len(words) - PHRASE + 1)]
    return len(set(phrases)) < len(phrases)


def against(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> dict[str, Any]:
    """What a model gained and lost beside the one that it was made from.

    Args:
        before: lines of the other's real_levir.json.
        now: lines of its own, of the same pairs.

    Returns:
        Differences of CIDEr-D x 100, of the number of false claims and of sentences that repeat a phrase, and a
        verdict on them: "gains CIDEr-D and loses truth" where more is claimed that is false, or repeated.

    Raises:
        InputError: other pairs.
    """

    def read(lines: list[dict[str, Any]]) -> tuple[float, int, int, int]:
        [scores] = [line for line in lines if line.get("captions") == "model" and line.get("of") == "all"]
        [told] = [line for line in lines if "claims" in line]
        return scores["cider_d"], sum(told["claims"].values()), told["repeated phrases"], told["pairs"]

    (*old, pairs), (*new, others) = read(before), read(now)
    if pairs != others:
        raise InputError(f"{pairs} pairs before and {others} now: compare models on the same split.")
    cider, false, repeated = (round(one - other, 1) for one, other in zip(new, old, strict=True))
    truth = "loses truth" if false > 0 or repeated > 0 else "keeps to the truth"
    verdict = f"{'gains' if cider > 0 else 'does not gain'} CIDEr-D and {truth}"
    return {"against": verdict, "cider_d": cider, "false claims": false, "repeated phrases": repeated}


def read_before(folder: Path) -> list[dict[str, Any]]:
    """The lines of the model before, of its --output.

    Raises:
        InputError: there are none, or they are of a version that did not count repeated phrases.
    """
    file = folder / "real_levir.json"
    lines: list[dict[str, Any]] = read_json(file)
    if not any("repeated phrases" in line for line in lines):
        raise InputError(f"{file} does not count repeated phrases: make it anew with this version.")
    return lines


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("--split", default="test", help="train, val or test (%(default)s)")
    parser.add_argument("--model", default="kcfi-tiny")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--before", type=Path, help="--output of the model that this one was made from")
    parser.add_argument("--no-meteor", action="store_true")
    options = parser.parse_args()
    before = read_before(options.before) if options.before else []  # at the start: a wrong folder costs no minutes

    model, processor = load(options.model)
    describer = Describer(model, processor)
    building = model.config.num_change_classes - 1
    pairs: Any = load_pairs(options.pairs, options.split)
    masks = {"model": MaskScores("building"), "everything changed": MaskScores("building")}
    pixels, whole = Reliability(), Reliability()
    predictions, certain = [], []
    for example in tqdm(pairs, "pairs", len(pairs), unit="pair"):
        images = example["image_before"], example["image_after"]
        [report] = describer.describe_pairs([images])
        [(logits, seen)] = describer.mask_logits([images])
        truth = true_mask(example, "building")
        predicted = (report.mask == building).astype(np.uint8)
        masks["model"].update(predicted, truth)
        masks["everything changed"].update(np.ones_like(truth), truth)
        probability = describer.calibration.class_probabilities(logits)[building].double().numpy()
        pixels.update(probability[seen.numpy()], (truth > 0)[seen.numpy()])
        changed = bool(example["changed"])
        whole.update(np.array([report.changed_probability]), np.array([changed]))
        certain.append((report.changed_probability, changed))
        predictions.append(
            PairPrediction(example["filename"], changed, example["captions"], report.caption, predicted, truth)
        )

    sentences = {"model": [pair.caption for pair in predictions], "always the same": [UNCHANGED] * len(predictions)}
    lines: list[dict[str, Any]] = []
    for name, captions in sentences.items():
        scores = results(
            captions,
            [pair.references for pair in predictions],
            [pair.changed for pair in predictions],
            model=options.model,
            dataset=options.pairs,
            split=options.split,
            meteor=not options.no_meteor,
        )
        lines += [{"captions": name, "pairs": scores["pairs"], "told apart": rounded(scores["change_accuracy"])}]
        lines += [{"captions": name, "of": rows, **rounded(values)} for rows, values in scores["captions"].items()]
    for name, mask in masks.items():
        scores = mask.compute() or {}
        row = {score: scores[score]["building"] for score in ("f1", "iou", "precision", "recall")}
        lines.append({"building": name, **rounded(row)})
    errors = {"mask": 100 * pixels.error, "pairs": 100 * whole.error}
    lines.append({"calibration": "expected error", **rounded(errors)})
    chances, truths = (np.array(column) for column in zip(*certain, strict=True))
    for rate in RATES:
        try:
            threshold = describer.calibration.threshold(rate)
        except InputError:
            continue
        alarms = chances > threshold
        kept = {"unchanged called changed": 100 * alarms[~truths].mean(), "changed found": 100 * alarms[truths].mean()}
        lines.append({"calibration": f"alarm rate {rate}", "threshold": round(threshold, 4), **rounded(kept)})
    counts = Counter(kind for pair in predictions for kind in claims(pair))
    repeated = sum(repeats(pair.caption) for pair in predictions)
    lines.append({"claims": dict(sorted(counts.items())), "repeated phrases": repeated, "pairs": len(predictions)})
    if before:
        lines.append(against(before, lines))
    for line in lines:
        print(json.dumps(line))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "real_levir.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
        rows = {
            pair.filename: {"caption": pair.caption, "false claims": claims(pair), "wrong pixels": wrong_pixels(pair)}
            for pair in predictions
        }
        (options.output / "pairs.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        draw_worst(pairs, predictions, options.output / "worst.png")
        draw_reliability({"building pixels": pixels, "pairs": whole}, options.output / "reliability.png")


def rounded(values: Any) -> Any:
    """Numbers to one decimal, in a dict or alone."""
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    return None if values is None else round(float(values), 1)


def wrong_pixels(pair: PairPrediction) -> int:
    """Pixels that are marked as building and are none, or the other way round."""
    assert pair.mask is not None and pair.true_mask is not None
    return int(((pair.mask > 0) != (pair.true_mask > 0)).sum())


def draw_worst(pairs: Any, predictions: list[PairPrediction], path: Path) -> None:
    """Draw the pairs with most wrong pixels of buildings; a false claim counts as 2,000 of them."""

    def cost(pair: PairPrediction) -> int:
        return wrong_pixels(pair) + 2000 * len(claims(pair))

    order = sorted(range(len(predictions)), key=lambda index: -cost(predictions[index]))[:WORST]
    examples = [pairs[index] for index in order]
    rows, texts = [], []
    for example, index in zip(examples, order, strict=True):
        pair, after = predictions[index], example["image_after"]
        rows.append([example["image_before"], after, *(overlay(after, m * 255) for m in (pair.true_mask, pair.mask))])
        false = ", ".join(claims(pair)) or "no false claim"
        texts.append(f"{pair.filename}: {false}\n{pair.caption}\n{pair.references[0]}")
    contact_sheet(rows, texts, ["before", "after", "true buildings", "predicted"]).save(path)


def draw_reliability(measured: dict[str, Reliability], path: Path) -> None:
    """Claimed probability against truth, a curve for each."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print('reliability.png needs matplotlib: pip install "kcfi[bench]"')
        return
    figure, axes = pyplot.subplots(figsize=(4.5, 4.5))
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, counts in measured.items():
        filled = counts.count > 0
        label = f"{name} (error {counts.error:.3f})"
        axes.plot(
            *((part[filled] / counts.count[filled]) for part in (counts.claimed, counts.true)), "o-", label=label
        )
    axes.set(xlabel="claimed probability", ylabel="share that was true", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
