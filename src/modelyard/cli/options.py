"""Options that several commands have, worded once."""

from pathlib import Path

import click

allow_domain_option = click.option(
    "--allow-domain",
    "allow_domains",
    multiple=True,
    metavar="DOMAIN",
    help="Consent to operators of this ONNX domain; repeat for more.",
)
prices_option = click.option(
    "--prices",
    type=click.Path(path_type=Path),
    envvar="MODELYARD_PRICES",
    help="Price file that overrides the catalogue.",
)
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
