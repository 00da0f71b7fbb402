"""`/docs` needs no network: every file comes from here, and a browser shows every operation."""

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

CHROMIUM = shutil.which("chromium")


def references(text: str) -> list[str]:
    """What a page loads: the addresses in its attributes and scripts."""
    return re.findall(r"""\b(?:src=|href=|url:\s*)["']([^"']+)""", text)


def test_every_file_is_served_here(api: httpx.Client) -> None:
    page = api.get("/docs")
    found = references(page.text)
    assert {Path(one).suffix for one in found} == {".js", ".css", ".png", ".json"}
    for address in found:
        assert address.startswith("/")
        assert not address.startswith("//")
        answer = api.get(address)
        assert (answer.status_code, len(answer.content) > 1000) == (200, True)
    assert "://" not in page.text


def test_a_page_that_loads_from_outside_would_be_noticed() -> None:
    assert references('<script src="https://example.org/a.js"></script>') == ["https://example.org/a.js"]


def test_styles_load_nothing(api: httpx.Client) -> None:
    styles = next(one for one in references(api.get("/docs").text) if one.endswith(".css"))
    text = api.get(styles).text
    assert set(re.findall(r"@import|url\([\"']?(\w+)", text)) == {"data"}


def test_there_is_no_redoc(api: httpx.Client) -> None:
    assert api.get("/redoc").status_code == 404


@pytest.mark.ui
@pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt-get install chromium")
def test_a_browser_shows_every_operation(api: httpx.Client, tmp_path: Path) -> None:
    assert CHROMIUM
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path}", "--virtual-time-budget=30000", "--dump-dom"]
    # Whatever is outside can't be reached, so that nothing of it can help.
    shown = subprocess.run(
        [*command, "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", f"{api.base_url}/docs"],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    paths = api.get("/openapi.json").json()["paths"]
    operations = {(method, path) for path, methods in paths.items() for method in methods}
    assert set(re.findall(r'class="opblock opblock-(\w+)', shown)) == {method for method, _ in operations}
    assert set(re.findall(r'data-path="([^"]+)"', shown)) == set(paths)
    assert len(re.findall(r'class="opblock opblock-\w+', shown)) == len(operations)
