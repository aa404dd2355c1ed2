"""Scores of captions and masks, and the results file that `kcfi evaluate` and `kcfi score` write.

Caption scores come from `pycocoevalcap`, mask scores from a `torchmetrics` confusion matrix. All of them x 100.
`caption_scores`, `change_accuracy`, `results` and `score_file` are pure functions; `KCFIMetric` wraps the first two
for `evaluate.load`.
"""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import NDArray
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from kcfi.files import name_some, read_json
from kcfi.processing import NO_LABEL, InputError
from kcfi.processing.places_kcfi import tells_of_change
from kcfi.training.data.levir_cc import read_all_captions, read_captions
from kcfi.training.data.pairs import CLASS_NAMES, MaskClasses, num_classes

# "coco" is pycocoevalcap 1.2 as it stands, the protocol of the paper and of systems built on language models.
# "levir-ids" is that of RSICCFormer, Chg2Cap and their successors: the same scorers see numbers in place of words.
Profile = Literal["coco", "levir-ids"]
# One row of the table: a score, or None where there is nothing to score.
Row = dict[str, float | None]

RARE = 5  # "levir-ids": words seen fewer times in the captions of all splits are all one unknown word (Chg2Cap)
UNKNOWN = "1"  # its number; behind it come start and end of a sentence, then the words

CAPTION_SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d", "s_m")


def caption_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    changed: Sequence[bool],
    profile: Profile = "coco",
    meteor: bool = True,
    vocabulary_captions: Iterable[str] = (),
) -> dict[str, Row]:
    """Score captions over all pairs, the changed ones and the unchanged ones, each row on its own pairs alone.

    CIDEr-D of the unchanged row is 0 by construction when its pairs share one set of references, as in LEVIR-CC: a
    phrase that every pair's references contain has an inverse document frequency of log(1) = 0.

    Args:
        predictions: One caption per pair; an empty one scores 0.
        references: The reference captions of each pair, in the same order.
        changed: Whether each pair is a changed one, in the same order.
        profile: Protocol of tokens and scorers.
        meteor: False leaves METEOR and S_m* out (None) and needs no Java: a regular expression then stands in for the
            PTB tokenizer.
        vocabulary_captions: What "levir-ids" takes its vocabulary from: in the literature all captions of the data
            set, those of the test pairs included. No other profile reads them.

    Returns:
        Rows "all", "changed", "unchanged"; each maps `CAPTION_SCORES` to a score x 100. S_m* is the mean of BLEU-4,
        METEOR, ROUGE-L and CIDEr-D (eq. 11). A row without pairs holds None throughout.

    Raises:
        FileNotFoundError: If `meteor` is true and there is no Java.
        InputError: If the lengths differ, a pair has no reference or one without a word, the profile is unknown, or
            "levir-ids" has no captions for its vocabulary.
        OSError: If a Java process fails.
    """
    if meteor:
        require_java()
    if profile not in get_args(Profile):
        raise InputError(f"profile '{profile}' is unknown; expected one of {', '.join(get_args(Profile))}")
    if not len(predictions) == len(references) == len(changed):
        raise InputError(
            f"{len(predictions)} predictions, {len(references)} reference lists and {len(changed)} changed flags; "
            "expected one of each per pair"
        )
    # One call for every distinct sentence: starting Java once per row would cost more than tokenizing.
    distinct = list(dict.fromkeys([*predictions, *chain.from_iterable(references)]))
    if profile == "levir-ids":
        forms: Iterable[str] = _id_tokens(distinct, vocabulary_captions)
    else:
        forms = _ptb_tokens(distinct) if meteor else map(plain_tokens, distinct)
    tokens = dict(zip(distinct, forms, strict=True))
    for index, sentences in enumerate(references):
        if not sentences or not all(tokens[sentence] for sentence in sentences):
            raise InputError(f"pair {index} has no reference caption, or one without a word: {list(sentences)}")
    rows = {
        "all": range(len(predictions)),
        "changed": [index for index, flag in enumerate(changed) if flag],
        "unchanged": [index for index, flag in enumerate(changed) if not flag],
    }
    pairs = {
        row: _Tokenized(
            {index: [tokens[sentence] for sentence in references[index]] for index in indices},
            {index: [tokens[predictions[index]]] for index in indices},
        )
        for row, indices in rows.items()
        if indices
    }
    meteors = _meteor(list(pairs.values())) if meteor else [None] * len(pairs)
    scores: dict[str, Row] = {row: dict.fromkeys(CAPTION_SCORES) for row in rows}
    for (row, tokenized), meteor_score in zip(pairs.items(), meteors, strict=True):
        scores[row] = _row(tokenized, meteor_score)
    return scores


class _Tokenized(NamedTuple):
    """The pairs of one row as pycocoevalcap's scorers take them: tokens joined by spaces, keyed by pair."""

    references: dict[int, list[str]]
    predictions: dict[int, list[str]]  # lists of one


def _row(tokenized: _Tokenized, meteor: float | None) -> Row:
    """Score one row x 100, given its METEOR score (0 to 1)."""
    bleu, _ = Bleu(4).compute_score(*tokenized, verbose=0)
    rouge_l, _ = Rouge().compute_score(*tokenized)
    cider_d, _ = Cider().compute_score(*tokenized)
    s_m = None if meteor is None else (bleu[3] + meteor + rouge_l + cider_d) / 4  # eq. 11
    scores = (*bleu, meteor, rouge_l, cider_d, s_m)
    return {
        name: None if score is None else 100 * float(score) for name, score in zip(CAPTION_SCORES, scores, strict=True)
    }


def require_java() -> str:
    """Path of Java.

    Raises:
        FileNotFoundError: If it is not on the PATH; says what to install.
    """
    java = shutil.which("java")
    if java is None:
        raise FileNotFoundError(
            "the PTB tokenizer and METEOR need Java, and there is no `java` on the PATH: install a Java runtime "
            "(Debian and Ubuntu: `apt install default-jre-headless`) or leave METEOR out (`--no-meteor`)"
        )
    return java


def _ptb_tokens(sentences: list[str]) -> list[str]:
    """Tokenize with Stanford's PTB tokenizer, lower-cased and without punctuation; an empty sentence stays empty.

    Same program, options and punctuation as pycocoevalcap's `PTBTokenizer`. That class is not called because it writes
    into its own installation folder, which may be read-only, loses count at a form feed or carriage return inside a
    sentence, and prints a line per call.
    """
    java = require_java()
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    options = ("-preserveLines", "-lowerCase", "-encoding", "UTF-8")
    process = subprocess.run(
        [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options],
        # One line per sentence: Java ends a line at more characters than "\n", and `split` knows all of them.
        input="".join(" ".join(sentence.split()) + "\n" for sentence in sentences),
        capture_output=True,
        encoding="utf-8",
    )
    lines = process.stdout.split("\n")[:-1]
    if process.returncode or len(lines) != len(sentences):
        raise OSError(
            f"the PTB tokenizer answered {len(lines)} lines to {len(sentences)} sentences "
            f"(exit code {process.returncode}): {process.stderr.strip()}"
        )
    return [" ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS) for line in lines]


def plain_tokens(sentence: str) -> str:
    """Tokenize without Java; equal to `_ptb_tokens` on every sentence of LEVIR-CC.

    Words keep inner hyphens and slashes, a possessive is a word of its own, punctuation is dropped and any other sign
    stands alone. Contractions ("don't"), brackets and decimal numbers come out differently.
    """
    return " ".join(re.findall(r"'s\b|\w+(?:[-/]\w+)*|[^\w\s.?!,:;'\"`-]", sentence.lower()))


def _id_tokens(sentences: Iterable[str], vocabulary_captions: Iterable[str]) -> list[str]:
    """Tokenize for "levir-ids": words between spaces, without full stops and question marks, as their numbers.

    Words are numbered in alphabetical order behind the four special ones, as the code of Chg2Cap does; RSICCFormer and
    Change-Agent drop words that are seen five times too. Case counts.
    """

    def words(sentence: str) -> list[str]:
        return re.sub("[.?]", "", re.sub("([;,])", r" \1", sentence)).split()

    counts = Counter(chain.from_iterable(map(words, vocabulary_captions)))
    if not counts:
        raise InputError("profile 'levir-ids' needs vocabulary_captions: its numbers stand for their words")
    known = sorted(word for word, count in counts.items() if count >= RARE)
    ids = {word: str(number) for number, word in enumerate(known, start=4)}
    return [" ".join(ids.get(word, UNKNOWN) for word in words(sentence)) for sentence in sentences]


def _meteor(rows: Sequence[_Tokenized]) -> list[float]:
    """Score each row with METEOR 1.5 (0 to 1) in one Java process, which is gone when this returns.

    The process speaks a line protocol with "|||" between sentences. PTB tokens hold neither a line feed nor "|||" (it
    splits bars), so no caption can desynchronise it.
    """
    scorer = Meteor()
    failure = None
    try:
        scores = [scorer.compute_score(*row)[0] for row in rows]
    except (OSError, ValueError) as error:  # a broken pipe, or an answer that is no number
        failure = error
    finally:
        scorer.meteor_p.kill()
        _, messages = scorer.meteor_p.communicate()
        if scorer.lock.locked():  # compute_score was interrupted; Meteor.__del__ would wait for its lock for ever
            scorer.lock.release()
    if failure is not None:
        raise OSError(f"METEOR's Java process failed: {messages.decode(errors='replace').strip()}") from failure
    return scores


def change_accuracy(predictions: Sequence[str], changed: Sequence[bool]) -> float:
    """Score changed/unchanged as read off the captions.

    A caption means "unchanged" when it is one of LEVIR-CC's five stock sentences, whatever its case, spaces and final
    full stop; every other caption, an empty one included, means "changed".

    Args:
        predictions: One caption per pair.
        changed: Whether each pair is a changed one, in the same order.

    Returns:
        Share of pairs read rightly, x 100.

    Raises:
        InputError: If the lengths differ or there is no pair.
    """
    if len(predictions) != len(changed) or not changed:
        raise InputError(
            f"{len(predictions)} predictions and {len(changed)} changed flags; expected one each per pair"
        )
    right = sum(tells_of_change(caption) == flag for caption, flag in zip(predictions, changed, strict=True))
    return 100 * right / len(changed)


class MaskScores:
    """Mask scores accumulated over a data set, not averaged per image.

    Class ids in, a dictionary of percentages out; the trainer and `kcfi evaluate` consume it. The counts follow the
    device of the predictions. They are this process's own: gather the masks, not the scores, over ranks.

    Args:
        mask_classes: Meaning of the class ids, as in `pairs.class_ids`.
    """

    def __init__(self, mask_classes: MaskClasses) -> None:
        self.class_names = CLASS_NAMES[mask_classes]
        # No sync: torchmetrics would gather in `compute`, which hangs where one rank alone scores what it gathered.
        self.confusion = MulticlassConfusionMatrix(
            num_classes(mask_classes), validate_args=False, sync_on_compute=False
        )

    def update(self, pred_ids: Tensor | NDArray[np.uint8], target_ids: Tensor | NDArray[np.uint8]) -> None:
        """Count one batch.

        Args:
            pred_ids: Predicted class ids, integers of any shape; 255 = not predicted (outside a crop).
            target_ids: True class ids of the same shape; 255 = no label. A pixel that is 255 in either is left out.

        Raises:
            ValueError: If the shapes differ or an id is no class.
        """
        pred_ids, target_ids = torch.as_tensor(pred_ids), torch.as_tensor(target_ids)
        if pred_ids.shape != target_ids.shape:
            raise InputError(f"predicted mask {tuple(pred_ids.shape)}, true mask {tuple(target_ids.shape)}")
        counted = (pred_ids != NO_LABEL) & (target_ids != NO_LABEL)
        pred_ids, target_ids = pred_ids[counted].long(), target_ids[counted].long()
        for name, ids in (("predicted", pred_ids), ("true", target_ids)):
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.class_names):
                raise InputError(
                    f"{name} mask holds {int(ids.min())} to {int(ids.max())}; expected class ids below "
                    f"{len(self.class_names)}, or {NO_LABEL} for no label"
                )
        self.confusion.to(pred_ids.device).update(pred_ids, target_ids)

    def compute(self) -> dict[str, Any] | None:
        """Derive the scores from the counts of all batches so far.

        Returns:
            None if no pixel had a label. Otherwise, all x 100: "f1", "iou", "precision" and "recall", dictionaries
            over "change" (any class but the background) and the names of those classes; "mean_iou", over the
            classes of `CLASS_NAMES` that occur in either mask, the background included; "accuracy", the share of
            labelled pixels with the right class. A class that occurs in neither mask has None for its scores.
        """
        if not self.confusion.update_called:
            return None
        matrix = self.confusion.compute()  # (classes, classes): true, predicted
        if not matrix.any():
            return None
        classes = [_class_scores(matrix[i, i], matrix[:, i].sum(), matrix[i].sum()) for i in range(len(matrix))]
        change = _class_scores(matrix[1:, 1:].sum(), matrix[:, 1:].sum(), matrix[1:].sum())
        named = {"change": change, **dict(zip(self.class_names[1:], classes[1:], strict=True))}
        ious = [scores["iou"] for scores in classes if scores["iou"] is not None]
        return {
            **{key: {name: scores[key] for name, scores in named.items()} for key in change},
            "mean_iou": sum(ious) / len(ious),
            "accuracy": 100 * int(matrix.trace()) / int(matrix.sum()),
        }


def _class_scores(right: Tensor, predicted: Tensor, labelled: Tensor) -> dict[str, float | None]:
    """Score one class x 100 from pixel counts: predicted and labelled so, predicted so, labelled so."""

    def percent(part: Tensor, whole: Tensor) -> float | None:
        if not predicted + labelled:
            return None
        return 100 * int(part) / int(whole) if whole else 0.0

    return {
        "f1": percent(2 * right, predicted + labelled),
        "iou": percent(right, predicted + labelled - right),
        "precision": percent(right, predicted),
        "recall": percent(right, labelled),
    }


def results(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    changed: Sequence[bool],
    *,
    model: str,
    dataset: str,
    split: str,
    profile: Profile = "coco",
    meteor: bool = True,
    vocabulary_captions: Iterable[str] = (),
    mask: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Score one split in the schema of results.json, which `kcfi evaluate` and `kcfi score` share.

    Pairs without references, of a data set of masks, count in no score of captions. `change_accuracy` is one: a mask
    of buildings alone does not tell what a sentence should say of a new road.

    Args:
        predictions: One caption per pair.
        references: The reference captions of each pair, in the same order; none for a pair without.
        changed: Whether each pair is a changed one, in the same order.
        model: What made the captions.
        dataset: What was scored.
        split: Split of the data set.
        profile: Protocol of the caption scores.
        meteor: As in `caption_scores`.
        vocabulary_captions: As in `caption_scores`.
        mask: What `MaskScores.compute` returned; None leaves the key "mask" out.

    Returns:
        JSON-ready dictionary: "model", "dataset", "split", "profile", "pairs" (how many have references, per row),
        "pairs_without_captions" if there are any; where there are references, "captions" (rows of `caption_scores`)
        and "change_accuracy"; with masks, "mask".

    Raises:
        FileNotFoundError: If `meteor` is true and there is no Java.
        InputError: If there is nothing to score, or `caption_scores` refuses something.
        OSError: If a Java process fails.
    """
    described = [row for row in zip(predictions, references, changed, strict=True) if row[1]]
    if not described and mask is None:
        raise InputError(f"{dataset}, split '{split}': no pair has a sentence, and none a mask to score")
    num_changed = sum(bool(flag) for _, _, flag in described)
    scores: dict[str, Any] = {
        "model": model,
        "dataset": dataset,
        "split": split,
        "profile": profile,
        "pairs": {"all": len(described), "changed": num_changed, "unchanged": len(described) - num_changed},
    }
    if len(described) < len(changed):
        scores["pairs_without_captions"] = len(changed) - len(described)
    if described:
        predictions, references, changed = zip(*described, strict=True)
        scores["captions"] = caption_scores(predictions, references, changed, profile, meteor, vocabulary_captions)
        scores["change_accuracy"] = change_accuracy(predictions, changed)
    return scores if mask is None else {**scores, "mask": mask}


def score_file(
    predictions: Path, references: Path, split: str = "test", profile: Profile = "coco", meteor: bool = True
) -> dict[str, Any]:
    """Score the captions that any system wrote for one split of LEVIR-CC.

    Args:
        predictions: JSON file `{filename: caption}`, plain or gzipped, with every pair of the split exactly once.
        references: LevirCCcaptions.json, plain or gzipped.
        split: Split to score.
        profile: Protocol of the caption scores; "levir-ids" numbers the words of all splits in `references`.
        meteor: As in `caption_scores`.

    Returns:
        The dictionary of `results`, the two paths standing for model and data set.

    Raises:
        FileNotFoundError: If a file, or Java where it is needed, is missing.
        InputError: If a file is refused, or file names are missing, unknown or repeated: they are named.
        OSError: If a Java process fails.
    """
    captions = read_json(predictions)
    if not isinstance(captions, dict) or not all(isinstance(caption, str) for caption in captions.values()):
        raise InputError(f"{predictions}: expected one JSON object {{filename: caption}}")
    pairs = read_captions(references, split)
    names = {pair.filename for pair in pairs}
    problems = [
        f"{len(wrong)} {kind}: {name_some(wrong)}"
        for kind, wrong in (("missing", names - captions.keys()), ("not in the split", captions.keys() - names))
        if wrong
    ]
    if problems:
        raise InputError(
            f"{predictions}: not the file names of split '{split}' in {references}; {'; '.join(problems)}"
        )
    return results(
        [captions[pair.filename] for pair in pairs],
        [pair.captions for pair in pairs],
        [bool(pair.changed) for pair in pairs],
        model=str(predictions),
        dataset=str(references),
        split=split,
        profile=profile,
        meteor=meteor,
        vocabulary_captions=_all_captions(references) if profile == "levir-ids" else (),
    )


def _all_captions(references: Path) -> list[str]:
    """Every sentence of a captions file, of all its splits."""
    pairs, _ = read_all_captions(references)
    return [caption for pair in pairs for caption in pair.captions]


class KCFIMetric(evaluate.Metric):
    """Caption scores and change accuracy as a metric of `evaluate`; `compute` takes what `caption_scores` takes.

    Use it directly, or load this file, no network needed (`kcfi` must be installed, because the file imports it):

    ```python
    metric = evaluate.load(kcfi.training.scoring.metrics.__file__)
    metric.add_batch(predictions=captions, references=references, changed=changed)
    metric.compute(profile="coco")["captions"]["changed"]["bleu_4"]
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Change-captioning scores x 100 over all, changed and unchanged pairs, and change accuracy.",
            citation="arXiv:2409.12612",
            inputs_description="predictions: one caption per pair; references: its captions; changed: its flag.",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.List(datasets.Value("string")),
                    "changed": datasets.Value("bool"),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        changed: list[bool],
        profile: Profile = "coco",
        meteor: bool = True,
        vocabulary_captions: Iterable[str] = (),
    ) -> dict[str, Any]:
        return {
            "captions": caption_scores(predictions, references, changed, profile, meteor, vocabulary_captions),
            "change_accuracy": change_accuracy(predictions, changed),
        }
