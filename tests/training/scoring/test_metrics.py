import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import psutil
import pytest
import torch
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from kcfi.processing.places_kcfi import UNCHANGED_SENTENCES
from kcfi.training.data.levir_cc import read_captions
from kcfi.training.scoring import metrics
from kcfi.training.scoring.metrics import (
    CAPTION_SCORES,
    KCFIMetric,
    MaskScores,
    caption_scores,
    change_accuracy,
    results,
    score_file,
)

LEVIR_CC = Path(__file__).parents[3] / "../shared/data/levir_cc_captions.json.gz"
needs_levir_cc = pytest.mark.skipif(not LEVIR_CC.is_file(), reason="the captions of LEVIR-CC are not at hand")

# Sentences that have upset a tokenizer or a line protocol: bars, line ends of several kinds, nothing at all.
AWKWARD = [
    "",
    "   ",
    ".",
    "a house ||| a road",
    "||||",
    "a|||b",
    "SCORE ||| a ||| b",
    "two\nlines",
    "two\r\nlines",
    "form\x0cfeed",
    "\u2028",
    "\x85 \x1c",
    "été ; déjà",
    "🏠",
    "",
]


def java_processes():
    return [child for child in psutil.Process().children(recursive=True) if "java" in child.name()]


@pytest.fixture
def files(tmp_path):
    """References of two test pairs and one training pair, and predictions for the test pairs."""
    entries = [
        ("a.png", "test", 1, ["a house is built near the road .", "a villa appears ."]),
        ("b.png", "test", 0, ["there is no difference .", "no change has occurred ."]),
        ("c.png", "train", 1, ["trees are removed ."]),
    ]
    images = [
        {"filename": name, "split": split, "changeflag": flag, "sentences": [{"raw": text} for text in texts]}
        for name, split, flag, texts in entries
    ]
    references, predictions = tmp_path / "references.json", tmp_path / "predictions.json"
    references.write_text(json.dumps({"images": images}))
    predictions.write_text(json.dumps({"b.png": "There is no difference", "a.png": "a house is built ."}))
    return predictions, references


def score_constant_sentence(folder, profile):
    names = [pair.filename for pair in read_captions(LEVIR_CC, "test")]
    predictions = folder / "constant.json"
    predictions.write_text(json.dumps(dict.fromkeys(names, "the scene is the same as before .")))
    return score_file(predictions, LEVIR_CC, split="test", profile=profile)


@needs_levir_cc
def test_the_constant_sentence_scores_on_levir_cc_as_published(tmp_path):
    scored = score_constant_sentence(tmp_path, "coco")
    expected = {"bleu_4": 51.4914, "meteor": 27.7727, "rouge_l": 60.5960, "cider_d": 101.9300, "s_m": 60.4475}
    assert {name: scored["captions"]["all"][name] for name in expected} == pytest.approx(expected, abs=0.001)
    assert scored["pairs"] == {"all": 1929, "changed": 964, "unchanged": 965}
    assert scored["captions"]["unchanged"]["cider_d"] == 0  # every phrase is in all references: idf 0
    assert scored["captions"]["unchanged"]["meteor"] == pytest.approx(100)
    assert scored["change_accuracy"] == pytest.approx(100 * 965 / 1929)


@needs_levir_cc
def test_the_constant_sentence_under_levir_ids_differs_where_words_matter(tmp_path):
    scored = score_constant_sentence(tmp_path, "levir-ids")
    # METEOR knows no stems, synonyms and function words of numbers; rare words are one in the idf of CIDEr-D
    expected = {"bleu_4": 51.4914, "meteor": 29.3289, "rouge_l": 60.5960, "cider_d": 101.9322}
    assert {name: scored["captions"]["all"][name] for name in expected} == pytest.approx(expected, abs=0.001)


@needs_levir_cc
def test_tokens_without_java_equal_ptb_on_every_sentence_of_levir_cc():
    sentences = {
        text for split in ("train", "val", "test") for pair in read_captions(LEVIR_CC, split) for text in pair.captions
    }
    ordered = sorted(sentences)
    assert [metrics.plain_tokens(text) for text in ordered] == metrics._ptb_tokens(ordered)


def test_tokens_without_java_equal_ptb_on_change_captions():
    sentences = [
        "A house is built on the left, near the road; trees are gone!",
        "two t-shaped villas appear at the road's end .",
        'a house/road with 3 "large" roofs - grey - shows up',
        "the path \\ lane is 'new' ...",
    ]
    assert [metrics.plain_tokens(text) for text in sentences] == metrics._ptb_tokens(sentences)


def test_ptb_tokens_equal_those_of_pycocoevalcap():
    sentences = ["A road's end -- (new) .", "the lane isn't 3.5 m wide", 'U.S. houses: "two", 1,000', "a/b & c"]
    theirs = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(sentences)})
    assert metrics._ptb_tokens(sentences) == [tokens for [tokens] in theirs.values()]


def test_awkward_captions_keep_their_place_and_leave_no_print_and_no_process(capfd):
    references = [["a house is built", f"{text} road"] for text in AWKWARD] + [
        ["a house is built", "some houses appear"]
    ]
    scores = caption_scores([*AWKWARD, "a house"], references, [True] * len(AWKWARD) + [False])
    for row in scores.values():
        assert all(0 <= score and math.isfinite(score) for score in row.values())
        assert row["s_m"] == pytest.approx(sum(row[name] for name in ("bleu_4", "meteor", "rouge_l", "cider_d")) / 4)
    assert scores["unchanged"]["meteor"] == pytest.approx(25.81998, abs=1e-4)  # as METEOR 1.5 scores it alone
    assert capfd.readouterr() == ("", "")
    assert java_processes() == []


def test_ptb_tokens_keep_one_line_per_sentence():
    tokens = metrics._ptb_tokens([*AWKWARD, "end"])
    assert [tokens[0], tokens[1], tokens[2], tokens[-2], tokens[-1]] == ["", "", "", "", "end"]
    assert tokens[7] == tokens[8] == "two lines"
    assert not any("|||" in line for line in tokens)


def test_rows_are_scored_on_their_own_pairs():
    predictions = ["a house is built", "many trees are gone", "there is no difference", "no change has occurred"]
    references = [["a house is built"], ["a b c d"], ["there is no difference"], ["there is no difference"]]
    scores = caption_scores(predictions, references, [True, True, False, False], meteor=False)
    assert list(scores) == ["all", "changed", "unchanged"]
    assert all(tuple(row) == CAPTION_SCORES for row in scores.values())
    assert scores["changed"]["rouge_l"] == pytest.approx(50)
    # Right and disjoint references score 10 (pycocoevalcap's scale), wrong ones 0: mean 5, x 100.
    assert scores["changed"]["cider_d"] == pytest.approx(500)
    assert scores["unchanged"]["cider_d"] == 0
    assert scores["unchanged"]["bleu_4"] == pytest.approx(
        caption_scores(predictions[2:], references[2:], [False, False], meteor=False)["all"]["bleu_4"]
    )


def test_bleu_and_rouge_follow_their_formulas():
    row = caption_scores(["road house"], [["road house built here"]], [True], meteor=False)["all"]
    assert row["bleu_1"] == pytest.approx(100 * math.exp(1 - 4 / 2))  # every word right, half as long
    assert row["rouge_l"] == pytest.approx(100 * (1 + 1.2**2) * 1 * 0.5 / (0.5 + 1.2**2 * 1))  # beta 1.2


def test_without_meteor_no_java_is_needed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    row = caption_scores(["a house ."], [["A house"]], [True], meteor=False)["all"]
    assert row["bleu_1"] == pytest.approx(100)
    assert row["meteor"] is None
    assert row["s_m"] is None


def test_missing_java_is_one_error_with_the_remedy(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"no `java` on the PATH: install a Java runtime .*--no-meteor"):
        caption_scores(["a"], [["a"]], [True])


def test_a_java_that_fails_is_an_error_and_not_a_hang(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho no memory >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"PTB tokenizer .*no memory"):
        caption_scores(["a"], [["a"]], [True])
    with pytest.raises(OSError, match="METEOR's Java process failed: no memory"):
        metrics._meteor([metrics._Tokenized({0: ["a"]}, {0: ["a"]})])
    gc.collect()  # Meteor.__del__ would hang here if its lock were still held


def test_a_row_without_pairs_holds_none():
    scores = caption_scores(["a house"], [["a house"]], [True], meteor=False)
    assert scores["unchanged"] == dict.fromkeys(CAPTION_SCORES)


@pytest.mark.parametrize(
    ("references", "changed", "message"),
    [
        ([["a"]], [True, True], "2 predictions, 1 reference lists and 2 changed flags"),
        ([["a"], []], [True, True], "pair 1 has no reference caption"),
        ([["a"], ["b", " ."]], [True, True], "pair 1 has no reference caption, or one without a word"),
    ],
)
def test_unmatched_or_wordless_references_are_refused(references, changed, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(["a", "b"], references, changed, meteor=False)


def test_an_unknown_profile_is_refused():
    with pytest.raises(ValueError, match="profile 'cocoa' is unknown; expected one of coco"):
        caption_scores(["a"], [["a"]], [True], profile="cocoa")


@pytest.mark.parametrize("sentence", UNCHANGED_SENTENCES)
def test_stock_sentences_mean_unchanged(sentence):
    variants = [sentence, f" {sentence.upper()} .", f"{sentence}.", sentence.replace(" ", "  ") + "\n"]
    assert change_accuracy(variants, [False] * 4) == 100
    assert change_accuracy(variants, [True] * 4) == 0


def test_every_other_caption_means_changed():
    captions = ["a house is built", "", "there is no difference in the houses", "no change has occurred"]
    assert change_accuracy(captions, [True, True, True, True]) == 75


def test_mask_scores_follow_the_counts():
    # true:      0 0 0 1 1 2 2 2 -      predicted: 0 1 0 1 2 2 2 0 2
    scores = MaskScores("road_building")
    scores.update(torch.tensor([[0, 1, 0], [1, 2, 2]]), torch.tensor([[0, 0, 0], [1, 1, 2]]))
    scores.update(torch.tensor([[2, 0, 2]]), torch.tensor([[2, 2, 255]]))
    computed = scores.compute()
    # road: 1 right of 2 predicted and 2 true; building: 2 of 3 and 3; change: 4 of 5 and 5; background: 2 of 3 and 3.
    assert computed["f1"] == pytest.approx({"change": 80, "road": 50, "building": 200 / 3})
    assert computed["iou"] == pytest.approx({"change": 400 / 6, "road": 100 / 3, "building": 50})
    assert computed["precision"] == pytest.approx({"change": 80, "road": 50, "building": 200 / 3})
    assert computed["recall"] == pytest.approx({"change": 80, "road": 50, "building": 200 / 3})
    assert computed["mean_iou"] == pytest.approx((50 + 100 / 3 + 50) / 3)
    assert computed["accuracy"] == pytest.approx(100 * 5 / 8)


def test_mask_scores_are_not_averaged_per_image():
    scores = MaskScores("change")
    scores.update(torch.tensor([1, 1, 1, 1]), torch.tensor([1, 1, 1, 1]))
    scores.update(torch.tensor([1, 0, 0, 0]), torch.tensor([0, 0, 0, 0]))
    computed = scores.compute()
    assert computed["precision"] == pytest.approx({"change": 80})
    assert computed["iou"] == pytest.approx({"change": 80})


def test_precision_counts_false_alarms_and_recall_misses():
    scores = MaskScores("building")
    scores.update(torch.tensor([1, 1, 1, 1, 0]), torch.tensor([1, 0, 0, 0, 1]))
    computed = scores.compute()
    assert computed["precision"] == pytest.approx({"change": 25, "building": 25})
    assert computed["recall"] == pytest.approx({"change": 50, "building": 50})


def test_pixels_without_label_or_prediction_do_not_count():
    scores = MaskScores("change")
    scores.update(torch.tensor([1, 255, 0]), torch.tensor([255, 1, 0]))
    computed = scores.compute()
    assert computed["accuracy"] == 100
    assert computed["f1"] == {"change": None}


def test_a_class_that_never_occurs_has_no_score_and_stays_out_of_the_mean():
    scores = MaskScores("road_building")
    scores.update(torch.tensor([0, 2]), torch.tensor([0, 2]))
    computed = scores.compute()
    for name in ("f1", "iou", "precision", "recall"):
        assert computed[name] == {"change": 100, "road": None, "building": 100}
    assert computed["mean_iou"] == 100


def test_a_class_that_is_only_predicted_or_only_true_scores_0():
    scores = MaskScores("road_building")
    scores.update(torch.tensor([1, 0]), torch.tensor([0, 2]))
    computed = scores.compute()
    for name in ("f1", "iou", "precision", "recall"):
        assert computed[name] == {"change": 0, "road": 0, "building": 0}


@pytest.mark.filterwarnings("error")
def test_masks_without_any_label_have_no_scores():
    scores = MaskScores("change")
    assert scores.compute() is None
    scores.update(torch.zeros(2, 4, dtype=torch.int64), torch.full((2, 4), 255))
    assert scores.compute() is None


def test_byte_masks_are_counted_like_long_ones():
    scores = MaskScores("road_building")
    scores.update(torch.tensor([0, 2, 255], dtype=torch.uint8), torch.tensor([0, 2, 1], dtype=torch.uint8))
    assert scores.compute()["accuracy"] == 100


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        ([0, 1], [0, 128], "true mask holds 0 to 128; expected class ids below 2"),
        ([0, 2], [0, 1], "predicted mask holds 0 to 2"),
        ([0, 1, 1], [0, 1], r"predicted mask \(3,\), true mask \(2,\)"),
    ],
)
def test_file_values_and_foreign_shapes_are_refused(predicted, true, message):
    with pytest.raises(ValueError, match=message):
        MaskScores("change").update(torch.tensor(predicted), torch.tensor(true))


def test_the_results_file_has_the_agreed_keys():
    mask = {"f1": {"change": 80.0}}
    arguments = (["a house", "b"], [["a house"], ["there is no difference"]], [True, False])
    scored = results(*arguments, model="m", dataset="d", split="test", meteor=False, mask=mask)
    assert list(scored) == ["model", "dataset", "split", "profile", "pairs", "captions", "change_accuracy", "mask"]
    assert (scored["model"], scored["dataset"], scored["split"], scored["profile"]) == ("m", "d", "test", "coco")
    assert scored["pairs"] == {"all": 2, "changed": 1, "unchanged": 1}
    assert scored["change_accuracy"] == 50
    assert json.loads(json.dumps(scored)) == scored
    assert "mask" not in results(*arguments, model="m", dataset="d", split="test", meteor=False)


def test_pairs_without_references_are_in_no_score_of_captions():
    about = {"model": "m", "dataset": "d", "split": "test", "meteor": False}
    alone = results(["a house", "b"], [["a house"], ["there is no difference"]], [True, False], **about)
    scored = results(
        ["a house", "x", "b"], [["a house"], [], ["there is no difference"]], [True, False, False], **about
    )
    assert scored.pop("pairs_without_captions") == 1
    assert scored == alone


def test_a_split_without_any_reference_has_no_scores_of_captions():
    mask = {"f1": {"change": 80.0}}
    about = {"model": "m", "dataset": "d", "split": "test", "meteor": True}
    scored = results(["a house", "b"], [[], []], [True, False], **about, mask=mask)
    assert list(scored) == ["model", "dataset", "split", "profile", "pairs", "pairs_without_captions", "mask"]
    assert (scored["pairs"]["all"], scored["pairs_without_captions"]) == (0, 2)
    with pytest.raises(ValueError, match="d, split 'test': no pair has a sentence, and none a mask"):
        results(["a house"], [[]], [True], **about)


def test_score_file_joins_by_file_name_and_scores_one_split(files):
    predictions, references = files
    scored = score_file(predictions, references, meteor=False)
    assert scored["pairs"] == {"all": 2, "changed": 1, "unchanged": 1}
    assert scored["change_accuracy"] == 100
    assert scored["captions"]["unchanged"]["bleu_4"] == pytest.approx(100)
    assert scored["captions"]["changed"]["bleu_4"] < 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a.png": "x"}', "1 missing: b.png"),
        ('{"a.png": "x", "b.png": "x", "c.png": "x", "d.png": "x"}', "2 not in the split: c.png, d.png"),
        ('{"a.png": "x", "d.png": "x"}', "1 missing: b.png; 1 not in the split: d.png"),
        ('{"a.png": "x", "b.png": "x", "a.png": "y"}', "a.png occurs more than once"),
        ('{"a.png": "x", "b.png": ["y"]}', r"expected one JSON object \{filename: caption\}"),
        ('["x"]', r"expected one JSON object \{filename: caption\}"),
        ("{", "not readable as JSON"),
    ],
)
def test_predictions_that_do_not_fit_are_refused_by_name(files, content, message):
    predictions, references = files
    predictions.write_text(content)
    with pytest.raises(ValueError, match=message):
        score_file(predictions, references, meteor=False)


TRAINING = ["a house, a road .", "a house ?", "a house", "a house", "a house, a road", "rare"]


def test_levir_ids_are_the_numbers_of_words_seen_five_times():
    sentences = ["a house .", "A house, a rare road?", ""]  # 4 = a, 5 = house
    assert metrics._id_tokens(sentences, TRAINING) == ["4 5", "1 5 1 4 1 1", ""]
    with pytest.raises(ValueError, match="'levir-ids' needs vocabulary_captions"):
        caption_scores(["a"], [["a"]], [True], "levir-ids", meteor=False)


def test_score_file_numbers_the_words_of_all_splits(files):
    predictions, references = files
    content = json.loads(references.read_text())
    content["images"][2]["sentences"] *= 5  # "trees are removed ." five times
    content["images"][2]["split"] = "val"
    references.write_text(json.dumps(content))
    predictions.write_text(json.dumps({"a.png": "are", "b.png": "who knows what is"}))
    scored = score_file(predictions, references, profile="levir-ids", meteor=False)
    assert scored["profile"] == "levir-ids"
    assert scored["captions"]["unchanged"]["bleu_4"] == pytest.approx(100)  # unknown words are all one
    assert scored["captions"]["changed"]["bleu_1"] == pytest.approx(0, abs=1e-6)


def test_the_metric_loads_from_its_file_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    arguments = {
        "predictions": ["a house is built", "there is no difference"],
        "references": [["a house is built"], ["there is no difference"]],
        "changed": [True, False],
    }
    expected = {
        "captions": caption_scores(**arguments, meteor=False),
        "change_accuracy": change_accuracy(arguments["predictions"], arguments["changed"]),
    }
    loaded = evaluate.load(metrics.__file__, cache_dir=str(tmp_path))
    assert loaded.compute(**arguments, meteor=False) == expected
    direct = KCFIMetric(cache_dir=str(tmp_path))
    for index in range(2):
        direct.add_batch(**{name: values[index : index + 1] for name, values in arguments.items()})
    assert direct.compute(meteor=False) == expected


def test_the_loaded_metric_scores_like_kcfi_score_in_a_process_without_network(files, tmp_path):
    predictions, references = files
    code = """
import json, sys, evaluate
import kcfi.training.scoring.metrics
from pathlib import Path
from kcfi.training.data.levir_cc import read_captions
metric = evaluate.load(kcfi.training.scoring.metrics.__file__, cache_dir=sys.argv[3])
captions = json.loads(Path(sys.argv[1]).read_text())
for pair in read_captions(Path(sys.argv[2]), "test"):
    metric.add_batch(predictions=[captions[pair.filename]], references=[pair.captions], changed=[pair.changed])
print(json.dumps(metric.compute(profile="levir-ids", meteor=False, vocabulary_captions=["a house appears ."] * 5)))
"""
    content = json.loads(references.read_text())
    content["images"][2]["sentences"] = [{"raw": "a house appears ."}] * 5
    references.write_text(json.dumps(content))
    command = [sys.executable, "-c", code, *map(str, (predictions, references, tmp_path / "cache"))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    scored = score_file(predictions, references, profile="levir-ids", meteor=False)
    assert json.loads(done.stdout) == {name: scored[name] for name in ("captions", "change_accuracy")}
