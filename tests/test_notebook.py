"""docs/scenes.ipynb runs as it stands there, and is kept without outputs."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "docs/scenes.ipynb", as_version=4)


def test_the_notebook_is_valid_and_has_no_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) == 6 and all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_the_notebook_ends_with_polygons_a_map_and_an_answer(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [
        "".join(output.get("text", "") + str(output.get("data", {})) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert "appeared in" in shown[1]  # the place has new houses and a new road
    assert "building" in shown[2] and "appeared" in shown[3] and "image/png" in shown[4]
    assert int(shown[5].split(":")[0]) > 0 and (tmp_path / "report/item.json").is_file()
