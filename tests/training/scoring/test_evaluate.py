import json

import numpy as np
import pytest
import torch
from PIL import Image

from kcfi.models import validation_dtype
from kcfi.training.collator import KCFICollator
from kcfi.training.scoring.evaluate import (
    PairPrediction,
    Scores,
    evaluate_model,
    flat_scores,
    pair_score,
    picture_sheet,
    predict,
    sample_sheet,
    telling_pairs,
)

SQUARE = np.zeros((8, 8), np.uint8)
SQUARE[2:6, 2:6] = 1
NOTHING = np.zeros((8, 8), np.uint8)


def prediction(caption="a house appears .", mask=SQUARE, true_mask=SQUARE, changed=True, filename="a.png"):
    return PairPrediction(filename, changed, ["a house appears .", "one house appears ."], caption, mask, true_mask)


@pytest.fixture
def saved(tmp_path, model, processor):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("size", [2, 3])
def test_predictions_do_not_depend_on_the_batch(model, processor, make_pairs, size):
    pairs, collator = make_pairs(4, masks="some"), KCFICollator(processor, train=False)
    model.eval()

    def predictions(count):
        found = []
        for first in range(0, 4, count):
            batch = collator([pairs[index] for index in range(first, min(4, first + count))])
            with torch.no_grad():
                found += predict(
                    model, processor, batch, model.get_image_features(batch["pixel_values"]), max_new_tokens=6
                )
        return found

    for alone, together in zip(predictions(1), predictions(size), strict=True):
        assert (alone.filename, alone.caption) == (together.filename, together.caption)
        assert np.array_equal(alone.mask, together.mask)
    assert [pair.true_mask is None for pair in predictions(4)] == [True, False, False, True]


def test_masks_are_predicted_at_the_size_of_the_images(model, processor, make_pairs):
    pair = make_pairs(2)[1]
    large = {name: value.resize((50, 40)) if isinstance(value, Image.Image) else value for name, value in pair.items()}
    large["mask"] = pair["mask"].resize((50, 40), Image.Resampling.NEAREST)
    batch = KCFICollator(processor, train=False)([large])
    with torch.no_grad():
        [found] = predict(
            model.eval(), processor, batch, model.get_image_features(batch["pixel_values"]), max_new_tokens=1
        )
    assert found.mask.shape == found.true_mask.shape == (40, 50)


@pytest.mark.parametrize(
    ("recipe", "device", "dtype"),
    [
        ("bf16: true\n", "cuda", torch.bfloat16),
        ("fp16: true\n", "cuda", torch.float16),
        ("bf16: false\n", "cuda", None),
        ("bf16: true\n", "cpu", None),
        (None, "cuda", None),
    ],
)
def test_scores_are_computed_as_the_validation_of_the_run_was(tmp_path, recipe, device, dtype):
    if recipe:
        (tmp_path / "recipe.yaml").write_text(f"{recipe}save_total_limit: null\n")
    assert validation_dtype(str(tmp_path), torch.device(device)) is dtype


def test_evaluation_asks_and_reads_as_it_is_told(detector, root, tmp_path):
    def captions(**more):
        evaluate_model(str(detector), str(root), "train", tmp_path / "results.json", meteor=False, **more)
        return json.loads((tmp_path / "predictions.json").read_text())

    plain = captions()
    assert captions(device="cpu", dtype="float32", num_workers=2, batch_size=1) == plain
    assert captions(instruction="a house appears in the left .") != plain
    with pytest.raises(ValueError, match="tile of 3 px is smaller than a patch"):
        captions(tile=3)


def test_a_pair_that_occurs_twice_is_named_at_once():
    with pytest.raises(ValueError, match=r"a\.png occurs more than once in this split"):
        Scores("change").update([prediction(), prediction()])


def test_scores_count_pixels_over_the_whole_data_set():
    scores = Scores("change")
    scores.update(
        [prediction(), prediction(mask=NOTHING, filename="b.png"), prediction(true_mask=None, filename="c.png")]
    )
    row = scores.metrics(meteor=False)
    assert row["mask_f1"] == pytest.approx(100 * 2 * 16 / (16 + 32))
    assert row["bleu_4"] is not None and "s_m" not in row
    assert row["change_accuracy"] == 100


def test_road_and_building_have_their_own_scores():
    scores = Scores("road_building")
    scores.update([prediction(mask=SQUARE * 2, true_mask=SQUARE)])
    row = scores.metrics(meteor=False)
    assert (row["mask_f1"], row["mask_f1_road"], row["mask_f1_building"]) == (100, 0, 0)


def test_captions_alone_have_no_mask_scores():
    scores = Scores("change")
    scores.update([prediction(mask=None, true_mask=None)])
    assert "mask_f1" not in scores.metrics(meteor=False)


def test_pairs_without_references_have_scores_of_masks_alone(make_pairs):
    def masked(filename):
        return PairPrediction(filename, True, [], "a tree .", SQUARE, SQUARE)

    mixed, alone = Scores("change"), Scores("change")
    mixed.update([prediction(mask=NOTHING), masked("b.png")])
    alone.update([masked("b.png")])
    row = mixed.metrics(meteor=False)
    assert row["bleu_1"] == pytest.approx(100) and row["change_accuracy"] == 100
    assert row["mask_f1"] == pytest.approx(100 * 2 * 16 / (16 + 32))
    assert alone.metrics(meteor=True).keys() == {"mask_f1", "mask_mean_iou"}
    assert pair_score(masked("b.png")) == 100
    pair = PairPrediction("b.png", True, [], "a tree .", None, None)
    described = prediction(mask=None, true_mask=None)
    sheets = [sample_sheet(make_pairs(2), [(0, sample)]) for sample in (pair, described)]
    assert sheets[0].size == sheets[1].size


def test_a_pair_scores_by_its_caption_and_its_mask():
    assert pair_score(prediction()) == pytest.approx(100)
    assert pair_score(prediction(mask=NOTHING)) == pytest.approx(50)
    assert pair_score(prediction(mask=NOTHING, true_mask=NOTHING)) == pytest.approx(100)
    assert pair_score(prediction(caption="", mask=None)) == 0
    border = np.where(SQUARE == 1, 255, 0).astype(np.uint8)  # the crop did not see the square
    assert pair_score(prediction(mask=border)) == pytest.approx(100)


def test_the_sheet_shows_the_best_the_median_and_the_worst_of_both_kinds(make_pairs):
    words = ["a house appears .", "a house .", "a tree appears .", "appears .", "nothing"]
    predictions = [
        prediction(words[index // 2], None, None, bool(index % 2), f"pair_{index}.png") for index in range(10)
    ]
    order = sorted(range(5), key=lambda word: -pair_score(predictions[2 * word]))
    kinds = {"best": order[0], "median": order[2], "worst": order[4]}
    assert telling_pairs(predictions, 1) == [
        *((f"changed, {kind}", 2 * word + 1) for kind, word in kinds.items()),
        *((f"unchanged, {kind}", 2 * word) for kind, word in kinds.items()),
    ]
    sheets = [picture_sheet(make_pairs(10), predictions, count=count) for count in (1, 2)]
    assert sheets[1].height > 1.8 * sheets[0].height  # a row per pair


def test_the_first_pairs_of_both_kinds_are_samples_and_drawn_changed_ones_first(make_pairs):
    scores = Scores("change")
    kinds = [False] * 5 + [True, False, True]
    for batch in (range(3), range(3, 8)):
        scores.update([prediction("", None, None, kinds[index], str(index)) for index in batch])
    assert [index for index, _ in scores.samples] == [0, 1, 2, 5, 7]
    assert all(pair.filename == str(index) for index, pair in scores.samples)
    sheet, first = (
        np.asarray(sample_sheet(make_pairs(8), samples)) for samples in (scores.samples, scores.samples[3:])
    )
    below = 22 + 2 * (256 + 6)  # titles, two rows
    assert np.array_equal(sheet[:below], first[:below]) and len(sheet) == below + 3 * (256 + 6) + 6


def test_results_predictions_and_pictures_are_written(saved, tmp_path):
    output = tmp_path / "out" / "results.json"
    report = evaluate_model(
        saved, "synthetic", "test", output, num_pairs=4, batch_size=3, max_new_tokens=4, meteor=False
    )
    assert json.loads(output.read_text()) == report
    assert (report["model"], report["dataset"], report["split"]) == (saved, "synthetic", "test")
    assert report["pairs"] == {"all": 4, "changed": 2, "unchanged": 2}
    assert flat_scores(report)["cider_d_changed"] == report["captions"]["changed"]["cider_d"]
    assert report["captions"]["all"]["s_m"] is None and 0 <= report["mask"]["f1"]["change"] <= 100
    assert len(json.loads((output.parent / "predictions.json").read_text())) == 4
    with Image.open(output.parent / "pairs.png") as sheet:
        assert sheet.width > 1000


def test_pairs_of_levir_cd_are_warned_of_by_name(saved, root, tmp_path, caplog):
    captions = root / "LevirCCcaptions.json"
    captions.write_text(captions.read_text().replace("c.png", "test_2_0000_0512.png"))
    for folder in (root / "images" / "val").iterdir():
        (folder / "c.png").rename(folder / "test_2_0000_0512.png")
    evaluate_model(saved, str(root), "val", tmp_path / "r.json", max_new_tokens=1, meteor=False)
    assert "1 pairs have file names of LEVIR-CD: test_2_0000_0512.png" in caplog.text


def test_masks_of_other_classes_than_the_models_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"mask_classes=road_building has 3 classes, the model num_change_classes=2"):
        evaluate_model(saved, "synthetic", "test", tmp_path / "r.json", num_pairs=1, mask_classes="road_building")


def test_other_scenes_are_drawn_with_another_seed(saved, tmp_path):
    names = []
    for seed in (0, 1):
        output = tmp_path / f"{seed}.json"
        report = evaluate_model(
            saved, "synthetic", "test", output, num_pairs=2, seed=seed, max_new_tokens=1, meteor=False
        )
        names.append(report["mask"])
    assert names[0] != names[1]
