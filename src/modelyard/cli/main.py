"""`modelyard`: the table of commands. A command's module is imported when it is called, so that --help stays quick."""

import errno
import importlib
import os
import sys
from typing import NoReturn

import click

from modelyard import __version__
from modelyard.cli.terminal import printable
from modelyard.errors import BundleError, ModelyardError

# Command → where it lives and its line in --help.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": (
        "modelyard.cli.run:run",
        "The whole job: data, training, compression, publishing, serving, a table to act on.",
    ),
    "train": ("modelyard.cli.train:train", "Train a model from labelled data and write its bundle."),
    "import": ("modelyard.cli.import_:import_", "Turn an ONNX file from elsewhere into a bundle in a store."),
    "compress": ("modelyard.cli.compress:compress", "Quantize a bundle; accept it only by measurement and test."),
    "bundle": ("modelyard.cli.bundle:bundle", "Show, verify and compare bundles."),
    "store": ("modelyard.cli.store:store", "List, publish and tag the versions in a store."),
    "serve": ("modelyard.cli.serve:serve", "Serve a store's models over HTTP and gRPC."),
    "predict": ("modelyard.cli.predict:predict", "Answer the rows of a file with a bundle."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `modelyard run yard.toml`; `modelyard COMMAND --help` shows examples.",
)
@click.version_option(__version__, prog_name="modelyard")
def cli() -> None:
    """From labelled data to a compressed, right-sized inference service, with the measurements that prove it."""


def main() -> None:
    """Run the command line; our own errors end it with one line and their exit code, 130 on Ctrl-C.

    So do errors of the operating system, with 2. A reader that closes the pipe, as `head` does, is met by click: it ends
    quietly.
    """
    try:
        code = cli(standalone_mode=False)  # click returns the code of an Exit here rather than raising it
        sys.stdout.flush()
        if isinstance(code, int):
            sys.exit(code)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except ModelyardError as exc:
        # Ours may have several lines; what is said of a bundle quotes it, and has one.
        _fail(printable(str(exc), keep="" if isinstance(exc, BundleError) else "\n\t"), exc.exit_code)
    except BrokenPipeError:
        _drop_broken_stdout()
        sys.exit(1)  # as click does
    except OSError as exc:
        _drop_broken_stdout()
        if exc.strerror is None:
            _fail(printable(str(exc)), 2)  # our own, e.g. FileExistsError, and complete
        remedy = _REMEDIES.get(exc.errno or 0, "correct the path or try again")
        where = "" if exc.filename is None else f"{exc.filename}: "  # none where a stream is full
        _fail(printable(f"{where}{exc.strerror}; {remedy}"), 2)


_PERMISSION, _SPACE = "change its permissions or choose another place", "make room or choose another place"
_REMEDIES = {
    errno.EACCES: _PERMISSION, errno.EPERM: _PERMISSION, errno.EROFS: _PERMISSION, errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE, errno.ENAMETOOLONG: "choose a shorter name",
}  # fmt: skip


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def _drop_broken_stdout() -> None:
    """Drop what stdout holds if it cannot be written, for Python would complain of it once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
