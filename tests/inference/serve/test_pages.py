"""The page that tries a model, used in a real browser as a person would."""

import os
import re
import shutil
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from side_server import SideServer, ask, side_server

from modelyard.bundle.format import write_bundle
from modelyard.bundle.manifest import Signature, TensorSpec
from modelyard.bundle.store import open_store
from modelyard.errors import StoreError
from modelyard.inference.serve.models.repository import Loaded, Pick, load
from modelyard.inference.serve.protocols import pages

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">"
STATIC = Path(pages.__file__).parent / "static"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",  # for whoever runs the tests as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def hostile_content(small: Any) -> Any:
    """The flights, whose names and labels are markup."""
    signature = small.signature

    def renamed(spec: TensorSpec) -> TensorSpec:
        return TensorSpec(
            name=spec.name,
            datatype=spec.datatype,
            shape=spec.shape,
            nullable=spec.nullable,
            categories=(HOSTILE, *spec.categories) if spec.categories else None,
            labels=(HOSTILE, "on_time") if spec.labels else None,
            unit=HOSTILE,
            description=HOSTILE,
        )

    inputs, outputs = (tuple(map(renamed, specs)) for specs in (signature.inputs, signature.outputs))
    return replace(small.content("hostile"), signature=Signature(inputs=inputs, outputs=outputs))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, publish: Any, small_models: Any) -> Iterator[SideServer]:
    store = tmp_path_factory.mktemp("store")
    for name in ("flights", "images", "tabular"):
        publish(store, small_models[name])
    publish(store, small_models["flights"], "flights")
    bundle = tmp_path_factory.mktemp("hostile") / "bundle"
    write_bundle(bundle, hostile_content(small_models["flights"]))
    open_store(store).publish(bundle)

    def load_one(pick: Pick) -> Loaded:
        if pick.name == "torn":
            raise StoreError("torn: the store has gone")
        return load(open_store(store), pick)

    picks = [Pick("flights", 2), Pick("flights", 1), Pick("images", 1), Pick("tabular", 1), Pick("hostile", 1)]
    with side_server(store, [*picks, Pick("torn", 1)], load_one=load_one) as running:
        yield running


# What is served, without a browser.


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.headers, answer.read()


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/docs/static/page.js", "/docs/static/page.css", "/docs/static/icon.svg"]
)
def test_every_file_comes_with_a_policy_that_allows_nothing_from_elsewhere(server: SideServer, path: str) -> None:
    headers, body = get(server.url + path)
    assert headers["Content-Security-Policy"].startswith("default-src 'self';")
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert body


def test_the_page_names_no_other_host_and_has_no_inline_script(server: SideServer) -> None:
    _, page = get(f"{server.url}/docs")
    text = page.decode()
    for path in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert path.startswith(("/", "#")), path
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", text)
    for script in STATIC.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script.read_text()), (
            script
        )


def test_unknown_files_models_and_versions_are_404(server: SideServer) -> None:
    for path in (
        "/docs/static/page.py",
        "/docs/static/..%2Fpages.py",
        "/docs/models/nobody/versions/1",
        "/docs/models/flights/versions/9",
    ):
        status, answer = ask(server.url + path)
        assert status == 404, path
        assert answer["error"]


def test_the_list_says_versions_states_and_reasons(server: SideServer) -> None:
    models = {model["name"]: model["versions"] for model in ask(f"{server.url}/docs/models")[1]["models"]}
    assert [(one["version"], one["state"], one["default"]) for one in models["flights"]] == [
        (2, "ready", True),
        (1, "ready", False),
    ]
    (torn,) = models["torn"]
    assert torn["state"] == "failed"
    assert "the store has gone" in torn["reason"]
    assert ask(f"{server.url}/docs/models/torn/versions/1")[0] == 503


def test_the_wheel_ships_the_page() -> None:
    """Package data that setuptools does not know of works in a checkout and nowhere else."""
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert "inference/serve/protocols/static/*" in text


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here")
    with playwright.sync_playwright() as tool:
        running = tool.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, server: SideServer) -> Iterator[Open]:
    """`open_page("#flights")`: a tab in which nothing may go wrong unseen."""
    wrong: list[str] = []
    contexts: list[Any] = []

    def opened(fragment: str = "", **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
        page.goto(f"{server.url}/{fragment}")
        page.wait_for_selector("main button, main .fault")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def predict(page: Any) -> None:
    page.get_by_role("button", name="Predict").click()
    page.wait_for_selector(".timeline")


def test_the_example_is_answered_with_label_bars_and_timeline(open_page: Open) -> None:
    page = open_page("#flights")
    assert page.get_by_label("dep_hour").input_value() == "5"
    predict(page)
    assert page.locator(".value").first.inner_text() == "on_time"
    assert page.locator(".bars tr").count() == 2
    assert page.locator(".bars tr").first.inner_text().split() == ["on_time", "0.9308"]
    assert [row.split()[0] for row in page.locator(".timeline tbody tr").all_inner_texts()] == [
        "read",
        "waited",
        "computed",
        "answered",
    ]
    assert re.search(r"Request \S+: arrived, .* ran alone for", page.locator(".sentence").inner_text())


def test_a_form_sends_missing_values_and_texts_never_seen(open_page: Open) -> None:
    page = open_page("#flights")
    page.get_by_label("distance").fill("")
    page.get_by_label("carrier", exact=True).select_option("another text…")
    page.get_by_label("carrier, another text").fill('Zephyr ✈ "x"')
    with page.expect_request("**:predict") as sent:
        predict(page)
    assert sent.value.post_data_json == {"instances": [{"dep_hour": 5, "distance": None, "carrier": 'Zephyr ✈ "x"'}]}
    page.get_by_label("carrier", exact=True).select_option("(missing)")
    with page.expect_request("**:predict") as sent:
        predict(page)
    assert sent.value.post_data_json["instances"][0]["carrier"] is None


def test_whole_numbers_keep_every_digit(open_page: Open) -> None:
    page = open_page("#flights")
    page.get_by_label("dep_hour").fill("9007199254740993")
    with page.expect_request("**:predict") as sent:
        page.get_by_role("button", name="Predict").click()
    assert '"dep_hour": 9007199254740993,' in sent.value.post_data


def test_more_rows_go_as_json_by_keyboard(open_page: Open) -> None:
    page = open_page("#flights")
    page.get_by_role("button", name="JSON").click()
    body = page.get_by_label("The body of the request")
    assert body.input_value() == '{"instances": [{"dep_hour": 5, "distance": 200.5, "carrier": "UA"}]}'
    body.fill(
        '{"instances": [{"dep_hour": 5, "distance": 1, "carrier": "UA"}, {"dep_hour": 23, "distance": 4000, "carrier": null}]}'
    )
    body.press("Control+Enter")
    page.get_by_role("heading", name="Row 1").wait_for()
    assert page.locator(".value").all_inner_texts() == ["on_time", "late"]
    assert "2 rows" in page.locator(".timeline").inner_text()


def test_what_is_wrong_is_said(open_page: Open) -> None:
    page = open_page("#flights")
    page.get_by_role("button", name="JSON").click()
    body = page.get_by_label("The body of the request")
    body.fill('{"instances": [{"dep_hour": 5.5}]}')
    body.press("Control+Enter")
    page.get_by_role("alert").wait_for()
    assert "400: row 0, column 'dep_hour' must be a whole number" in page.get_by_role("alert").inner_text()
    body.fill('{"instances"')
    body.press("Control+Enter")
    page.get_by_text("This is no JSON").wait_for()


def test_a_list_takes_numbers_between_commas_and_counts_them(open_page: Open) -> None:
    page = open_page("#tabular")
    values = page.get_by_label("features")
    values.fill("1, 2 3")
    page.get_by_role("button", name="Predict").click()
    page.get_by_text("features takes 30 values, got 3").wait_for()
    values.fill(" ".join(["0.5"] * 30))
    predict(page)
    assert page.locator(".bars tr").count() == 2


def png(pixels: Any) -> bytes:
    """Return a grey picture of bytes, shape (height, width)."""
    height, width = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_picture_is_brought_to_the_models_size(open_page: Open, small_models: Any) -> None:
    page = open_page("#images")
    with page.expect_request("**:predict") as sent:  # the example goes as it is
        predict(page)
    example = np.array(sent.value.post_data_json["instances"][0]["image"])
    assert (example == small_models["images"].rows["image"][0]).all()
    picture = np.zeros((56, 56), dtype=np.uint8)
    picture[:, 28:] = 255
    page.get_by_label("Picture").set_input_files({"name": "half.png", "mimeType": "image/png", "buffer": png(picture)})
    page.get_by_text("brought from 56 × 56 to 28 × 28").wait_for()
    page.get_by_role("button", name="Invert").click()
    with page.expect_request("**:predict") as sent:
        predict(page)
    pixels = np.array(sent.value.post_data_json["instances"][0]["image"])
    assert pixels.shape == (28, 28, 1)
    assert (pixels[:, :13] == 255).all()
    assert (pixels[:, 15:] == 0).all()
    assert page.locator(".bars tr").count() == 10


def test_a_digit_can_be_drawn(open_page: Open) -> None:
    page = open_page("#images")
    page.get_by_role("button", name="Clear").click()
    box = page.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 20, steps=5)
    page.mouse.up()
    with page.expect_request("**:predict") as sent:
        predict(page)
    pixels = np.array(sent.value.post_data_json["instances"][0]["image"])[..., 0]
    assert pixels[14, 14] == 255
    assert pixels[:, :8].max() == 0


def test_the_snippets_ask_the_same(open_page: Open) -> None:
    page = open_page("#flights")
    page.get_by_label("carrier", exact=True).select_option("another text…")
    page.get_by_label("carrier, another text").fill("it's $HOME")
    page.get_by_label("distance").fill("")
    page.get_by_text("The same with curl or Python").click()
    curl, python = (page.locator(f"pre[aria-label={name}]").inner_text() for name in ("curl", "Python"))
    asked = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, check=True, timeout=60)
    assert "'label': 'on_time'" in asked.stdout
    assert "timeline" in asked.stdout
    if shutil.which("curl"):
        asked = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, check=True, timeout=60)
        assert '"label":"on_time"' in asked.stdout


def test_a_long_row_goes_into_a_file_beside_the_snippet(open_page: Open, tmp_path: Path) -> None:
    page = open_page("#images")
    page.get_by_text("The same with curl or Python").click()
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save row.json").click()
    saving.value.save_as(tmp_path / "row.json")
    python = page.locator("pre[aria-label=Python]").inner_text()
    asked = subprocess.run(
        [sys.executable, "-c", python],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=dict(os.environ),
    )
    assert "'label'" in asked.stdout


def test_what_models_call_themselves_stays_text(open_page: Open) -> None:
    page = open_page("#hostile")
    page.locator("main select").select_option(HOSTILE)
    page.get_by_label("dep_hour").fill("23")
    page.get_by_label("distance").fill("4000")
    predict(page)
    assert page.locator(".bars th").first.inner_text() == HOSTILE
    page.get_by_text("The same with curl or Python").click()
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "hostile: Modelyard"


def test_other_versions_and_models_that_failed_can_be_looked_at(open_page: Open) -> None:
    page = open_page("#torn")
    assert "the store has gone" in page.locator(".fault").inner_text()
    page.get_by_role("link", name="flights 1").click()
    page.get_by_text("version 1 ·").wait_for()
    with page.expect_request("**/v1/models/flights/versions/1:predict"):
        predict(page)
    page.get_by_role("link", name="images").click()
    page.locator("canvas").wait_for()
    page.go_back()
    page.get_by_label("dep_hour").wait_for()


def test_everything_can_be_reached_by_keyboard(open_page: Open) -> None:
    page = open_page("#flights")
    reached: list[str] = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.name || document.activeElement.textContent || document.activeElement.id"
            )
        )
    focused = " ".join(reached)
    for control in ("OpenAPI document", "flights 1", "images", "Form", "JSON", "Predict", "The same with curl"):
        assert control in focused, (control, reached)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length && !e.ariaLabel).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("model", ["flights", "images", "hostile"])
def test_the_page_fits_a_phone(open_page: Open, model: str, scheme: str) -> None:
    page = open_page(f"#{model}", viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    predict(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
