"""Captions over HTTP: `transformers serve`, an OpenAI-compatible server, with a KCFI model and a guard in front."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from kcfi.modeling_kcfi import KCFIConfig, KCFIForConditionalGeneration
from kcfi.models import model_source, public_name
from kcfi.processing import InputError


def serve(model: str, options: Sequence[str], **limits: Any) -> None:
    """Serve one model until the process is interrupted: the work of `kcfi serve`.

    The server of transformers 5.23 loads classes of transformers, and what this one list names; neither the other Auto
    classes nor `trust_remote_code` lead it to a model from outside. So the model is entered there. It makes its app by
    a function, which is replaced by one that puts a `ChatGuard` around the app.

    Args:
        model: folder, Hub id or "kcfi-tiny".
        options: of `transformers serve`, for example `["--port", "8001"]`.
        **limits: of `RequestLimits`.

    Raises:
        InputError: the extra `serve` is not installed, or there is no such model.
        SystemExit: when the server ends, or an option is wrong.
    """
    if not is_serve_available():
        raise InputError('The server of transformers is not installed: `pip install "kcfi[serve]"`.')
    from transformers.cli.serving import server
    from transformers.cli.transformers import app

    from kcfi.web.limits import RequestLimits
    from kcfi.web.memory import keep_arenas_small

    keep_arenas_small()
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[KCFIConfig.model_type] = KCFIForConditionalGeneration.__name__
    AutoModelForMultimodalLM.register(KCFIConfig, KCFIForConditionalGeneration, exist_ok=True)
    dtype = "auto" if torch.cuda.is_available() else "float32"  # as `kcfi caption`
    build_server = server.build_server
    server.build_server = guarded(build_server, model, RequestLimits(**limits))
    try:
        app(["serve", model_source(model), "--dtype", dtype, *options], prog_name="kcfi")
    finally:
        server.build_server = build_server


def guarded(build_server: Callable[..., Any], name: str, limits: Any) -> Callable[..., Any]:
    """`build_server` of transformers, but for a guard around its app; where the model lies is nobody's business.

    Args:
        build_server: its first argument is the manager, which has loaded the one model.
        name: of the model, as it was given.
        limits: of the guard, `RequestLimits`.
    """
    from kcfi.web.chat_guard import ChatGuard

    def build(manager: Any, *args: Any, **kwargs: Any) -> Any:
        [(_, loaded)] = manager.loaded_models.items()
        source, shown = manager.force_model, public_name(name)
        manager.force_model = shown  # the name that answers give
        manager.loaded_models = {manager.process_model_name(shown): loaded}
        app = build_server(manager, *args, **kwargs)
        return ChatGuard(app, loaded.model, loaded.processor.image_token, [shown, name, source], limits)

    return build
