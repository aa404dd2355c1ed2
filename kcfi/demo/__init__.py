"""A page to look at: two images in a browser -> the sentence, the mask and its threshold; `kcfi demo`."""

from importlib.util import find_spec

from kcfi.processing import InputError

if find_spec("gradio") is None:
    raise InputError('The page needs Gradio: pip install "kcfi[demo]"')
