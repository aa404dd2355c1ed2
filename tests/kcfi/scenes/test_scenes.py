"""The room itself: without its packages one line says what to install."""

import importlib
import importlib.util

import pytest

import kcfi.scenes
from kcfi.processing import InputError


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name in ("geopandas", "pystac") else found(name)
        )
        with pytest.raises(InputError) as refusal:
            importlib.reload(kcfi.scenes)
    assert str(refusal.value) == 'Scenes need geopandas, pystac: pip install "kcfi[geo]"'
    importlib.reload(kcfi.scenes)
