"""A training run -> the folder of an embedded model: bf16 weights, and no copy of the code, which the package holds.

```
python -m kcfi.training.export runs/tiny hub_configs/kcfi-tiny
```
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import kcfi  # noqa: F401 (registers the Auto classes)

SETTINGS = ("config.json", "processor_config.json", "tokenizer_config.json")


def export(source: str | Path, output: str | Path) -> None:
    """Write the weights, settings and tokenizer of a saved model; a card that is there stays.

    Args:
        source: folder that `kcfi train` wrote.
        output: folder to write; created if missing.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
        AutoProcessor.from_pretrained(source).save_pretrained(folder)
        for file in Path(folder).iterdir():
            if file.name in SETTINGS:
                (output / file.name).write_text(_without_code(file.read_text(encoding="utf-8")), encoding="utf-8")
            elif file.suffix != ".py":
                (output / file.name).write_bytes(file.read_bytes())


def _without_code(settings: str) -> str:
    """JSON settings without `auto_map`, at any depth: it names files of code that lie beside them on the Hub."""

    def strip(values: object) -> object:
        if isinstance(values, dict):
            return {key: strip(value) for key, value in values.items() if key != "auto_map"}
        return values

    return json.dumps(strip(json.loads(settings)), indent=2, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Command line: source, output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder that `kcfi train` wrote")
    parser.add_argument("output", help="folder to write")
    options = parser.parse_args(argv)
    export(options.source, options.output)


if __name__ == "__main__":
    main()
