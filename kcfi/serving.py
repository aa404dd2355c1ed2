"""Captions over HTTP: `transformers serve`, an OpenAI-compatible server, with a KCFI model."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from kcfi.modeling_kcfi import KCFIConfig, KCFIForConditionalGeneration
from kcfi.models import model_source
from kcfi.processing import InputError


def serve(model: str, options: Sequence[str]) -> None:
    """Serve one model until the process is interrupted: the work of `kcfi serve`.

    The server of transformers 5.23 loads classes of transformers, and what this one list names; neither the other Auto
    classes nor `trust_remote_code` lead it to a model from outside. So the model is entered there.

    Args:
        model: folder, Hub id or the name of an embedded model.
        options: of `transformers serve`, for example `["--port", "8001"]`.

    Raises:
        InputError: the extra `serve` is not installed, or there is no such model.
        SystemExit: when the server ends, or an option is wrong.
    """
    if not is_serve_available():
        raise InputError('The server of transformers is not installed: `pip install "kcfi[serve]"`.')
    from transformers.cli.transformers import app

    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[KCFIConfig.model_type] = KCFIForConditionalGeneration.__name__
    AutoModelForMultimodalLM.register(KCFIConfig, KCFIForConditionalGeneration, exist_ok=True)
    dtype = "auto" if torch.cuda.is_available() else "float32"  # as `kcfi caption`
    app(["serve", model_source(model), "--dtype", dtype, *options], prog_name="kcfi")
