"""`kcfi serve`: captions over HTTP."""

import argparse

from kcfi_cli.options import Commands, add_limit_options, add_model_option, limits_given


def add_parser(commands: Commands) -> None:
    """The parser of `kcfi serve`."""
    parser = commands.add_parser(
        "serve",
        usage="kcfi serve [--model MODEL] [--option value ...]",
        help="answer requests over HTTP",
        description="Serve the captions of a model by `transformers serve`, which speaks OpenAI's chat completions.\n"
        "It reads two images that a request holds, and fetches nothing.\n"
        "Further options go to it: --host, --port, --device, --dtype ... (`transformers serve --help`).",
        epilog="example: kcfi serve --model runs/paper --port 8001",
    )
    add_model_option(parser)
    add_limit_options(parser)
    parser.set_defaults(run=run, takes_more=True)


def run(options: argparse.Namespace) -> None:
    """`kcfi serve`."""
    given = limits_given(options)
    from kcfi.serving import serve

    serve(options.model, options.more, **given)
