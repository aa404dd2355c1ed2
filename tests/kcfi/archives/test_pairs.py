"""Where pairs come from."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pystac
import pytest
from PIL import Image

from kcfi.archives.pairs import find_pairs


def test_folders_are_paired_by_file_name_and_other_files_are_left_alone(folders):
    (folders / "A" / "notes.txt").write_text("mine")
    pairs = find_pairs(folders / "A", folders / "B").to_pylist()
    assert [pair["name"] for pair in pairs] == [f"pair_{number}" for number in range(7)]
    assert pairs[1]["before"] == str(folders / "A/pair_1.png") and pairs[1]["after"] == str(folders / "B/pair_1.png")


def test_images_without_a_partner_are_named(folders):
    (folders / "B" / "pair_2.png").unlink()
    for number in range(4):
        Image.new("RGB", (8, 8)).save(folders / "B" / f"new_{number}.png")
    with pytest.raises(ValueError, match=r"without a partner .*new_0\.png, .*new_1\.png, .*new_2\.png and 2 more\."):
        find_pairs(folders / "A", folders / "B")
    (folders / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no pairs in it"):
        find_pairs(folders / "empty", folders / "empty")


def test_two_pairs_of_one_name_are_refused_by_that_name(folders):
    for folder in ("C", "D"):
        (folders / folder).mkdir()
        for name in ("another.png", "one.png", "one.jpg"):
            Image.new("RGB", (8, 8)).save(folders / folder / name)
    with pytest.raises(ValueError, match=r"two pairs are called 'one'; name them in a manifest"):
        find_pairs(folders / "C", folders / "D")


def test_a_manifest_of_excel_names_pairs_anywhere(folders):
    rows = "name,before,after\nfirst,A/pair_0.png,B/../B/pair_1.png\n,A/pair_2.png,https://host/x/3.png?key=a/b.c\n"
    (folders / "pairs.csv").write_text(rows, encoding="utf-8-sig")
    first, second = find_pairs(folders / "pairs.csv").to_pylist()
    here = {"before": str(folders / "A/pair_0.png"), "after": str(folders / "B/pair_1.png")}
    assert first == {"name": "first", **here}
    assert second["name"] == "3" and second["after"] == "https://host/x/3.png?key=a/b.c"


def test_a_parquet_manifest_gives_what_the_same_csv_gives(folders):
    rows = {"note": [1, 2], "after": ["B/pair_0.png", "B/pair_1.png"], "before": ["A/pair_0.png", "/A/x.png"]}
    pq.write_table(pa.table(rows), folders / "pairs.parquet")
    (folders / "pairs.csv").write_text("before,after\nA/pair_0.png,B/pair_0.png\n/A/x.png,B/pair_1.png\n")
    assert find_pairs(folders / "pairs.parquet") == find_pairs(folders / "pairs.csv")


def test_rows_of_more_than_one_chunk_are_all_there_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("kcfi.archives.pairs.AT_ONCE", 3)
    names = [str(number) for number in range(10)]
    pq.write_table(pa.table({"name": names, "before": names, "after": names}), tmp_path / "pairs.parquet")
    assert find_pairs(tmp_path / "pairs.parquet")["name"].to_pylist() == names


@pytest.fixture
def collection(tmp_path):
    """A STAC collection in a folder, with an item of two assets; more assets can be given."""

    def build(*assets):
        extent = pystac.Extent(pystac.SpatialExtent([[0, 0, 1, 1]]), pystac.TemporalExtent([[None, None]]))
        made = pystac.Collection("archive", "pairs", extent)
        point = {"type": "Point", "coordinates": [0, 0]}
        item = pystac.Item("place-1", point, [0, 0, 0, 0], pystac.utils.str_to_datetime("2024-05-30"), {})
        for name in assets:
            item.add_asset(name, pystac.Asset(f"../images/{name}.tif"))
        made.add_item(item)
        made.normalize_hrefs(str(tmp_path / "stac"))
        made.save(pystac.CatalogType.SELF_CONTAINED)
        return tmp_path / "stac" / "collection.json"

    return build


def test_an_item_of_a_stac_collection_with_two_assets_is_a_pair(collection, tmp_path):
    [pair] = find_pairs(collection("before", "after", "thumbnail")).to_pylist()
    folder = tmp_path / "stac" / "images"
    assert pair == {"name": "place-1", "before": f"{folder}/before.tif", "after": f"{folder}/after.tif"}


def test_an_item_without_both_dates_and_other_json_are_refused(collection, tmp_path):
    with pytest.raises(ValueError, match=r"item place-1: has no asset 'after'.* It has before, mask"):
        find_pairs(collection("before", "mask"))
    for other in ({"type": "FeatureCollection"}, ["no", "object"], None):
        (tmp_path / "other.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"other.json: not readable as a STAC collection"):
            find_pairs(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"place-1.json: not readable as a STAC collection \(it is of type Item\)"):
        find_pairs(tmp_path / "stac/place-1/place-1.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "needs the columns before and after; it has a, b"),
        ("", "it has none"),
        ("before,after\n", "no pairs in it"),
        ("before,after\na.png,\n", "line 2: needs before and after"),
        ("before,after,name\na.png,b.png,x/y\n", "line 2: 'x/y' cannot name a pair: .* no slash"),
        ("before,after,name\na.png,b.png,..\n", "line 2: '..' cannot name a pair"),
        ("before,after,name\na.png,b.png,.work\n", "line 2: '.work' cannot name a pair"),
        ("before,after,name\na.png,b.png,x\\y\n", "cannot name a pair"),
        ("before,after,name\na.png,b.png,x\0\n", "cannot name a pair"),
        ("before,after\na.png,https://host/\n", "line 2: '' cannot name a pair"),
        ("before,after\n" + 200_000 * "a" + ",b.png\n", "pairs.csv: not readable as CSV in UTF-8 .*field larger"),
        ("before,after\na/1.png,b/1.png\nc/1.png,d/1.png\n", "two pairs are called '1'"),
        ("before,after\nnowhere://a.png,b.png\n", "nowhere://a.png: cannot be read by URL: Protocol not known"),
    ],
)
def test_a_bad_manifest_is_refused(tmp_path, text, message):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_pairs(tmp_path / "pairs.csv")


def test_names_that_lead_out_of_the_output_are_refused_wherever_they_come_from(collection, folders):
    path = collection("before", "after")
    item = path.parent / "place-1" / "place-1.json"
    item.write_text(item.read_text().replace('"id": "place-1"', '"id": ".."'))
    with pytest.raises(ValueError, match=r"item ..: '..' cannot name a pair"):
        find_pairs(path)
    for folder in "AB":
        (folders / folder / "pair_0.png").rename(folders / folder / ".work.png")
    with pytest.raises(ValueError, match=r"A/.work.png: '.work' cannot name a pair"):
        find_pairs(folders / "A", folders / "B")


def test_a_csv_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "pairs.csv").write_text("before,after\nä.png,b.png\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"pairs.csv: not readable as CSV in UTF-8"):
        find_pairs(tmp_path / "pairs.csv")


def test_parquet_that_is_none_or_lacks_columns_is_refused(tmp_path):
    path = tmp_path / "pairs.parquet"
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"pairs.parquet: not readable as parquet"):
        find_pairs(path)
    pq.write_table(pa.table({"before": ["a"]}), path)
    with pytest.raises(ValueError, match="needs the columns before and after; it has before"):
        find_pairs(path)
    pq.write_table(pa.table({"before": ["a"], "after": [["a", "b"]]}), path)
    with pytest.raises(ValueError, match=r"pairs.parquet: not readable as parquet"):
        find_pairs(path)
    pq.write_table(pa.table({"before": ["a", "b"], "after": ["a", None]}), path)
    with pytest.raises(ValueError, match="row 2: needs before and after"):
        find_pairs(path)
