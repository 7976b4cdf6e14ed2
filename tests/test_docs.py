"""The documents say what the code does: commands, options, keys, examples, links."""

import ast
import contextlib
import doctest
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
import numpy as np
import pytest
from msgspec import structs
from onnx import TensorProto, helper

from modelyard import errors
from modelyard.bundle.store import open_store
from modelyard.cli.config import Yard, load_yard
from modelyard.cli.main import cli
from modelyard.inference.serve.models.config import load_config
from modelyard.inference.serve.scheduling.scheduling import DropCause, Reason, RefusalCause
from modelyard.inference.serve.transport.grpc import status_of
from modelyard.prices import load_prices
from modelyard.schema import to_builtins
from modelyard.training import checks

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FIXTURE = ROOT / "tests" / "fixtures" / "bundle-v1"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
SERVER, GRPC_SERVER = "localhost:8000", "localhost:8001"
"""Where examples expect a server with the fixture as model "late", versions 1 and 2, and a model of images "digits"."""
OPTIONAL = ("grpc", "grpc_health", "kserve", "lightgbm", "ovmsclient", "pandas", "sklearn", "torch", "tritonclient")


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is where its text begins."""

    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    found: list[Block] = []
    lines: list[str] = []
    language, start = None, 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if language is None and line.startswith("```"):
            language, start, lines = line[3:].strip(), number + 1, []
        elif language is not None and line == "```":
            if language in languages:
                found.append(Block(page, start, language, "\n".join(lines) + "\n"))
            language = None
        else:
            lines.append(line)
    assert language is None, f"{_name(page)}: the fence opened before line {start} is never closed"
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def sections(page: Path, level: str = "##") -> dict[str, str]:
    """Heading → the text below it, up to the next heading of the same or a higher level."""
    parts = re.split(rf"^#{{2,{len(level)}}} (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# Commands


def commands(
    command: click.Command = cli, path: tuple[str, ...] = ("modelyard",)
) -> Iterator[tuple[str, click.Command]]:
    """Every command as "modelyard bundle show" → command, groups included."""
    yield " ".join(path), command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, (*path, name))


COMMANDS = dict(commands())


def options(command: click.Command) -> set[str]:
    found = {o for p in command.params if isinstance(p, click.Option) for o in p.opts if o.startswith("--")}
    return found | {"--help"}


def parse(arguments: list[str]) -> None:
    """Parse as the command line would, without running; raises click.UsageError."""
    command: click.Command = cli
    while isinstance(command, click.Group):
        name, *rest = arguments or [""]
        if name.startswith("-"):
            assert name in options(command) | {"-h"}, f"no option {name}"
            return
        found = command.get_command(click.Context(command), name)
        if found is None:
            raise click.UsageError(f"no command {name!r}")
        command, arguments = found, rest
    try:
        command.make_context(command.name, arguments)
    except click.exceptions.Exit:
        return  # --help


def shell_commands(block: Block) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, words) of every simple command of one line or of lines joined by a backslash; heredocs are left out."""
    lines = enumerate(block.text.splitlines(), start=block.line)
    for number, line in lines:
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        while line.endswith("\\"):
            line = line[:-1] + next(lines)[1]
        heredoc = re.search(r"<<-?\s*['\"]?(\w+)", line)
        if heredoc:
            line = line[: heredoc.start()]
            while next(lines)[1].strip() != heredoc[1]:
                pass
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quotation over several lines: no command of ours
            continue
        yield from ((number, part) for part in _simple(words))


def _simple(words: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    skip = False
    for word in words:
        if set(word) <= set("<>") or word in (">&", "&>"):
            if part and part[-1].isdigit():
                part.pop()
            skip = True
        elif set(word) <= set("();|&"):
            yield part
            part, skip = [], False
        elif skip:
            skip = False
        else:
            part.append(word)
    yield part


def modelyard_calls() -> list[Any]:
    calls = []
    for page in PAGES:
        for block in blocks(page, "sh", "console", "bash"):
            for number, words in shell_commands(block):
                while words and re.fullmatch(r"\w+=\S*|sudo|time|exec", words[0]):
                    words = words[1:]
                if words[1:3] == ["-m", "modelyard"]:
                    words = words[2:]
                if words and words[0].rpartition("/")[2] == "modelyard":
                    calls.append(pytest.param(words[1:], id=f"{_name(page)}:{number}"))
    return calls


@pytest.mark.parametrize("arguments", modelyard_calls())
def test_every_command_line_in_the_documents_parses(arguments: list[str]) -> None:
    parse(arguments)


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["train", "--frobnicate"], ["predict", "bundle"], ["bundle", "shwo", "x"]]
)
def test_parsing_notices_a_command_line_that_is_wrong(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError):
        parse(arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_names_every_command_with_exactly_its_options(name: str) -> None:
    section = sections(DOCS / "reference" / "cli.md", "###").get(name)
    assert section is not None, f"docs/reference/cli.md has no heading {name!r}"
    assert set(re.findall(r"--[a-z][a-z-]*", section)) | {"--help"} == options(COMMANDS[name])


def test_the_reference_names_no_command_that_is_not_there() -> None:
    named = {title for title in sections(DOCS / "reference" / "cli.md", "###") if title.startswith("modelyard")}
    assert named == set(COMMANDS)


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not isinstance(command, click.Group)])
def test_the_reference_has_an_example_of_every_command(name: str) -> None:
    section = sections(DOCS / "reference" / "cli.md", "###")[name]
    assert re.search(rf"^```sh\n(.*\n)*?{name}\b", section, re.MULTILINE)


def test_the_reference_names_every_environment_variable() -> None:
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("examples/**/*.py")]
    used = {name for path in sources for name in re.findall(r"\bMODELYARD_[A-Z_]+", path.read_text(encoding="utf-8"))}
    text = sections(DOCS / "reference" / "cli.md")["Environment variables"]
    assert set(re.findall(r"\bMODELYARD_[A-Z_]+", text)) == used


# yard.toml


def tables(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, type[msgspec.Struct]]]:
    """Every table as "" or "data" → its struct."""
    yield prefix, struct
    for field in structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from tables(field.type, f"{prefix}.{field.encode_name}".lstrip("."))


TABLES = dict(tables(Yard))


def default_text(field: structs.FieldInfo) -> str:
    """The default as TOML, "required", or "–" for none."""
    if field.required:
        return "required"
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    value = to_builtins(value)
    return "–" if value is None else json.dumps(list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("table", TABLES)
def test_the_reference_names_every_key_of_the_configuration_with_its_default(table: str) -> None:
    title = f"[{table}]" if table else "Top level"
    rows = re.findall(
        r"^\| `([\w.]+)` \|[^|]*\| `?([^|`]+)`? \|", sections(DOCS / "reference" / "yard-toml.md")[title], re.MULTILINE
    )
    keys = {f.encode_name: default_text(f) for f in structs.fields(TABLES[table]) if f.type not in TABLES.values()}
    assert dict(rows) == keys


def toml_blocks() -> list[Any]:
    return [pytest.param(b, id=f"{_name(p)}:{b.line}") for p in PAGES for b in blocks(p, "toml")]


@pytest.mark.parametrize("block", toml_blocks())
def test_every_toml_example_is_read_by_the_real_loader(block: Block, tmp_path: Path) -> None:
    """Whole files as they are; tables of a yard.toml within the smallest whole file."""
    found = tomllib.loads(block.text)
    path = tmp_path / "example.toml"
    if found.keys() <= {"server", "defaults", "models"}:
        path.write_text(block.text, encoding="utf-8")
        load_config(path)
        return
    if "device" in found:
        path.write_text(block.text, encoding="utf-8")
        assert {device["id"] for device in found["device"]} <= set(load_prices(path))
        return
    missing = "" if "name" in found else 'name = "example"\n'
    data = found.get("data", {})
    source = "" if "path" in data or "callable" in data else 'path = "rows.csv"\n'
    text = missing + block.text
    if source:
        text = text.replace("[data]\n", f"[data]\n{source}") if "[data]\n" in text else f"{text}\n[data]\n{source}"
    path.write_text(text, encoding="utf-8")
    load_yard(path)


# Python and HTTP


def brightest_pixel(path: Path) -> None:
    """Write a model of images of 28 × 28 bytes, whose label is the place of the first of the brightest pixels."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 28, 28, 1])
    label = helper.make_tensor_value_info("label", TensorProto.INT64, ["n"])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 784])
    graph = helper.make_graph(nodes, "brightest", [image], [label, scores])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())


@dataclass(frozen=True)
class Addresses:
    """Where a server listens, host:port each."""

    http: str
    grpc: str

    def of(self, text: str) -> str:
        """Return `text` with these in the place of the ones in the documents."""
        return text.replace(SERVER, self.http).replace(GRPC_SERVER, self.grpc)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Addresses]:
    """Run a real server with the models that the examples ask."""
    store = folder / "store"
    for version in ("1", "2"):
        shutil.copytree(FIXTURE, store / "late" / version)
    open_store(store).tag("late", "champion", 1)
    brightest_pixel(folder / "digits.onnx")
    importing = ["import", str(folder / "digits.onnx"), "--name", "digits", "--store", str(store)]
    subprocess.run([sys.executable, "-m", "modelyard", *importing], check=True, capture_output=True)
    command = [sys.executable, "-m", "modelyard", "serve", str(store), "--port", "0", "--grpc-port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            told = json.loads(process.stdout.readline())
            yield Addresses(told["url"].removeprefix("http://"), told["grpc"])
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    with serving(tmp_path_factory.mktemp("docs")) as addresses:
        yield addresses


def pages_with(*languages: str) -> list[Any]:
    return [pytest.param(page, id=_name(page)) for page in PAGES if blocks(page, *languages)]


def runnable(found: list[Block]) -> list[Block]:
    """The blocks that import nothing which is missing here; skips the test where none is left."""
    missing = {package for package in OPTIONAL if importlib.util.find_spec(package) is None}
    left = [block for block in found if not missing & set(re.findall(r"\b(?:import|from) (\w+)", block.text))]
    if not left:
        pytest.skip(f"needs one of {', '.join(sorted(missing))}")
    return left


@pytest.mark.parametrize("page", pages_with("python", "pycon"))
def test_python_examples_run(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page one after the other, in a folder with the fixture as ./bundle; pycon blocks show what they give."""
    found = runnable(blocks(page, "python", "pycon"))
    addresses = Addresses(SERVER, GRPC_SERVER)
    if any(SERVER in block.text or GRPC_SERVER in block.text for block in found):
        addresses = request.getfixturevalue("server")
    shutil.copytree(FIXTURE, tmp_path / "bundle")
    if any('Path("pictures")' in block.text for block in found):
        picture(tmp_path / "pictures" / "three.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    for block in found:
        text = addresses.of(block.text)
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + text, str(page), "exec"), names)
            continue
        example = doctest.DocTestParser().get_doctest(text, names, _name(page), str(page), block.line - 1)
        report: list[str] = []
        runner.run(example, out=report.append, clear_globs=False)
        names.update(example.globs)
        assert not report, "".join(report)
    if (tmp_path / "pictures").is_dir():
        assert names["labels"] == [3]


def picture(path: Path) -> None:
    """Save a picture of 28 × 28 with one bright pixel, the fourth."""
    pixels = np.zeros((28, 28), dtype=np.uint8)
    pixels[0, 3] = 255
    path.parent.mkdir()
    pytest.importorskip("PIL.Image").fromarray(pixels).save(path)


def curls(page: Path) -> list[list[str]]:
    """The words of each curl command that asks the server of the examples, over one line or several, in the page's order."""
    parts = [text for block in blocks(page, "sh") for text in re.split(r"\n(?=curl )", block.text)]
    commands = [shlex.split(text, comments=True)[1:] for text in parts if text.startswith("curl ")]
    return [words for words in commands if any(SERVER in word for word in words) and "@row.json" not in words]


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=_name(page)) for page in PAGES if page.parent != ROOT and curls(page)]
)
def test_curl_examples_of_a_page_are_answered_one_after_the_other(page: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as addresses:
        for words in curls(page):
            headers, body, url, method = {}, None, "", None
            for flag, value in zip(words, [*words[1:], ""], strict=True):
                if flag == "-H":
                    name, _, text = value.partition(": ")
                    headers[name] = text
                elif flag == "-d":
                    body = value.encode()
                elif flag == "-X":
                    method = value
                elif SERVER in flag:
                    url = "http://" + addresses.of(flag)
            with urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method)) as answer:
                assert answer.status == 200
                assert answer.headers["X-Request-Id"]
                if answer.headers["Content-Type"] == "application/json":
                    json.loads(answer.read())


# The server


def documented_paths() -> set[str]:
    """The paths in the table of routes, each with all places that [PLACE] stands for."""
    paths = set()
    for path in re.findall(r"[` ](/[^`]*)`", sections(DOCS / "reference" / "http.md")["Routes"]):
        labels = ["/labels/LABEL"] if path.startswith("/v1") else []
        places = ["", "/versions/VERSION", *labels] if "[PLACE]" in path else [""]
        paths |= {path.replace("[PLACE]", place) for place in places}
    return paths


def test_the_reference_names_every_route(server: Addresses) -> None:
    """The OpenAPI document has them all, which is tested elsewhere."""
    with urllib.request.urlopen(f"http://{server.http}/openapi.json") as answer:
        told = {
            re.sub(r"\{\w+\}", lambda match: match[0].strip("{}").upper(), path) for path in json.load(answer)["paths"]
        }
    routes = {re.sub(r"/models/(MODEL|late|digits)(?=[:/]|$)", "/models/NAME", path) for path in told}
    assert routes <= documented_paths()


def table(page: Path, title: str) -> list[list[str]]:
    """The cells of the rows of the tables below a heading."""
    lines = sections(page, "###")[title].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_the_reference_names_every_status_and_its_twin_in_grpc() -> None:
    told = {row[0] for row in table(DOCS / "reference" / "http.md", "Status codes")}
    twins = {
        code: row[0] for row in table(DOCS / "reference" / "grpc.md", "Status codes") for code in row[1].split(", ")
    }
    for found in vars(errors).values():
        if inspect.isclass(found) and issubclass(found, errors.ModelyardError):
            assert str(found.status) in told
            if found is not errors.UnsupportedEncoding:  # gRPC has a status of its own for that, given at the edge
                error = found.__new__(found)
                assert twins[str(found.status)] == f"`{status_of(error).name}`"


def test_the_reference_explains_every_cause_and_every_reason() -> None:
    page = DOCS / "reference" / "http.md"
    causes = {row[0].strip("`") for row in table(page, "Refusals")}
    assert {*get_args(RefusalCause), *get_args(DropCause)} <= causes
    assert all(f"`{reason}`" in sections(page)["The timeline"] for reason in get_args(Reason))
    explained = sections(DOCS / "explanation" / "batching.md")["How to read an explained request"].replace("\\", "")
    assert all(f"*{reason}*" in explained for reason in get_args(Reason))


@pytest.mark.parametrize(
    "page",
    # These two name the options of other programs.
    [
        pytest.param(page, id=_name(page))
        for page in PAGES
        if page.name not in ("open-inference-conformance.md", "benchmarks.md")
    ],
)
def test_options_named_in_the_text_exist(page: Path) -> None:
    named = set(re.findall(r"`[^`]*?(--[a-z][a-z-]*)", prose(page)))
    assert named <= set().union(*map(options, COMMANDS.values())) | {"--version"}


# Findings, links, errors


def test_the_how_to_explains_every_finding_of_the_data_report() -> None:
    tree = ast.parse(inspect.getsource(checks))
    codes = {
        constant.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Finding"
        for constant in ast.walk(call.args[1])
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }
    page = (DOCS / "how-to" / "bring-your-data.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z-]+)`", page, re.MULTILINE)) == codes


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links() -> list[Any]:
    pattern = re.compile(r"\]\(([^)\s]+)\)")
    return [
        pytest.param(page, target, id=f"{_name(page)} {target}")
        for page in PAGES
        for target in dict.fromkeys(pattern.findall(prose(page)))
        if "://" not in target and not target.startswith("mailto:")
    ]


@pytest.mark.parametrize(("page", "target"), links())
def test_links_between_documents_lead_somewhere(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    assert there.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {slug(heading) for heading in headings}


def test_the_index_leads_to_every_document() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"README.md"}
    assert pages <= {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", index)}


def test_the_error_tree_in_the_docstring_is_the_one_in_the_code() -> None:
    """Name, parent and builtin base of each."""
    drawn: dict[str, tuple[str, str | None]] = {}
    above: list[tuple[int, str]] = [(-1, "ModelyardError")]
    for indent, name, builtin in re.findall(
        r"^([ │]*[├└]── )(\w+)(?: \((\w+)\))?", inspect.cleandoc(errors.__doc__ or ""), re.M
    ):
        while above[-1][0] >= len(indent):
            above.pop()
        drawn[name] = (above[-1][1], builtin or None)
        above.append((len(indent), name))
    classes = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.ModelyardError)]
    written = {}
    for found in classes:
        if found is not errors.ModelyardError:
            parent, *others = found.__bases__
            written[found.__name__] = (parent.__name__, others[0].__name__ if others else None)
    assert drawn == written
