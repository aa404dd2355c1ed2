"""A request of OpenAI's chat completions about a pair -> the same request, of which nothing is left to be decided.

Whatever is asked, the server of transformers is given one message with two PNGs of 8-bit RGB and one size, an
instruction, how many tokens the answer may have, and whether it is streamed.
"""

import base64
import binascii
import io
import json
from collections.abc import Sequence
from typing import Any

from PIL import Image

from kcfi.processing import INSTRUCTIONS, InputError
from kcfi.processing.describer_kcfi import LONGEST
from kcfi.processing.reading_kcfi import read_pair
from kcfi.web.limits import FORMATS, Refused, RequestLimits, check_header

TAKEN = {"model", "messages", "stream", "max_tokens", "max_completion_tokens"}
WITHOUT_EFFECT = {"temperature", "top_p", "seed", "user", "stream_options"}  # answers are greedy
LONGEST_TEXT = 2000  # characters of an instruction; those of the paper have 200
MOST_COMMAS = 10_000  # of a request, with those of its text: each may part two values, of 64 bytes and more once read
SEND = "send two images inside of the request, each as data:image/png;base64,..., the earlier one first"


def plain_request(body: bytes, models: Sequence[str], image_token: str, limits: RequestLimits) -> bytes:
    """Read a request and both its images, and write it anew.

    Args:
        body: JSON.
        models: names by which the model may be asked for, the first is shown; a request without one is for it, too.
        image_token: placeholder of the model's prompts, which no text may hold.
        limits: of the server.

    Raises:
        Refused: 400, 413 or 415.
    """
    if body.count(b",") > MOST_COMMAS:
        raise Refused(413, "The request has more values than two images and a text: leave out what is not asked for.")
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The request is not JSON.") from error
    if not isinstance(request, dict):
        raise Refused(400, 'The request is no JSON object: send {"messages": [...]}.')
    unknown = sorted(request.keys() - TAKEN - WITHOUT_EFFECT)
    if unknown:
        taken = ", ".join(sorted(TAKEN))
        raise Refused(400, f"The field {unknown[0][:40]!r} is not taken here: leave out all but {taken}.")
    model = request.get("model")
    if not (model is None or (isinstance(model, str) and model in models)):
        raise Refused(400, f"This server has one model, {models[0]!r}: name it, or leave `model` out.")
    stream = request.get("stream") or False
    if not isinstance(stream, bool):
        raise Refused(400, "`stream` is true or false.")
    images, text = _message(request.get("messages"))
    if image_token in text:
        raise Refused(400, f"The text holds {image_token}, which stands for the images: leave it out.")
    content = [{"type": "image_url", "image_url": {"url": _png_url(image)}} for image in _pair(images, limits)]
    message = {"role": "user", "content": [*content, {"type": "text", "text": text or INSTRUCTIONS[0]}]}
    return json.dumps({"messages": [message], "stream": stream, "max_tokens": _tokens(request)}).encode()


def _tokens(request: dict[str, Any]) -> int:
    """How many tokens the answer may have; a caption never has more than `LONGEST`."""
    given = [request[name] for name in ("max_completion_tokens", "max_tokens") if request.get(name) is not None]
    if any(type(number) is not int or number < 1 for number in given):
        raise Refused(400, "`max_tokens` is a whole number from 1 on.")
    return min([*given, LONGEST])


def _message(messages: Any) -> tuple[list[Any], str]:
    """The sources of the images of the one message, and its text."""
    message = messages[0] if isinstance(messages, list) and len(messages) == 1 else None
    content = message.get("content") if isinstance(message, dict) and message.get("role") == "user" else None
    if not isinstance(content, list):
        raise Refused(400, f"`messages` holds one message of the role user, with a list of parts: {SEND}.")
    images, texts = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url":
            source = part.get("image_url")
            images.append(source.get("url") if isinstance(source, dict) else source)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise Refused(400, "A part of a message is of the type image_url or text, and no other is taken here.")
    if len(images) != 2:
        raise Refused(400, f"A pair has two images, this message has {len(images)}: {SEND}.")
    text = "".join(texts)
    if len(text) > LONGEST_TEXT:
        raise Refused(400, f"The text has {len(text):,} characters, at most {LONGEST_TEXT:,} are read: shorten it.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Refused(400, "The text is no Unicode (it has half of a pair of surrogates): write it anew.")
    return images, text


def _pair(sources: list[Any], limits: RequestLimits) -> tuple[Image.Image, Image.Image]:
    """Both images as the model sees them; none is decoded before both headers were looked at."""
    files = [io.BytesIO(_content(source)) for source in sources]
    for file in files:
        check_header(file, limits)
        file.seek(0)
    try:
        return read_pair(*(Image.open(file, formats=FORMATS) for file in files))
    except InputError as error:
        raise Refused(400, f"{error} Images of 8 bits are read here, both of one size.") from error


def _content(source: Any) -> bytes:
    """The file in a data URL."""
    if not isinstance(source, str) or not source.startswith("data:"):
        raise Refused(400, f"Nothing is fetched, neither addresses nor files of the server are read: {SEND}.")
    about, _, data = source.partition(",")
    if not about.startswith("data:image/") or not about.endswith(";base64"):
        raise Refused(400, f"A data URL here is of an image, in base64: {SEND}.")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"What follows {about[:40]!r} is not base64: {SEND}.") from error


def _png_url(image: Image.Image) -> str:
    """A data URL of an image; nobody but the server behind reads it, so it is not made small."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
