"""What the server sends for the page, without a browser: the closed list, its headers, and what the files may refer to."""

import hashlib
import importlib
import re
import shutil
import zipfile
from pathlib import Path

import httpx
import pytest

from sortserve.server.console import FOLDER, load_files
from sortserve.server.state import ServerOptions
from tests.server.fake_backend import FakeBackend, open_client

ROOT = Path(__file__).resolve().parents[3]
# of the published builds that console/vendor/README.md names
VENDORED = {
    "htm-preact-standalone.js": "72284e8e9079c87817145df1110f74e8a2aa040b2fc384922e18dfcb46fc1fd7",
    "uPlot.esm.js": "5dd9b3281aa64b461b42d9945f6adb2649d346502b12281a9ae0d46599a80eba",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


async def test_the_page(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.content == (FOLDER / "index.html").read_bytes()
    expected = {
        "Content-Security-Policy": "default-src 'self'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-cache",
    }
    assert {name: response.headers.get(name) for name in expected} == expected


async def test_every_file_is_served_with_its_type_and_kept_until_it_changes(client: httpx.AsyncClient) -> None:
    types = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
    served = [path for path in FOLDER.rglob("*") if path.suffix in types]
    assert len(served) > 15
    for path in served:
        url = f"/console/{path.relative_to(FOLDER).as_posix()}"
        response = await client.get(url)
        assert response.content == path.read_bytes(), url
        assert response.headers["Content-Type"] == types[path.suffix]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        etag = response.headers["ETag"]
        again = await client.get(url, headers={"If-None-Match": f'"another", W/{etag}'})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", etag)
        assert (await client.get(url, headers={"If-None-Match": '"another"'})).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "nothing.js",
        "",
        "../console.py",
        "%2e%2e/console.py",
        "vendor/README.md",
        "vendor/LICENSE-htm",
        "vendor",
        "/etc/passwd",
    ],
)
async def test_nothing_else_is_served(client: httpx.AsyncClient, name: str) -> None:
    response = await client.get(f"/console/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


async def test_the_page_needs_no_key_and_the_rest_still_does() -> None:
    async with open_client(FakeBackend(), ServerOptions(api_keys=("secret",))) as client:
        for path in ("/", "/console/app.js", "/console/vendor/uPlot.esm.js", "/console/nothing.js"):
            assert (await client.get(path)).status_code != 401, path
        for path in (
            "/v1/submodels",
            "/tokenizer_info",
            "/console",
            "/consolex",
            "//console/app.js",
            "/v1/models/console/",
        ):
            assert (await client.get(path)).status_code == 401, path


async def test_it_is_no_part_of_the_api(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert "/v1/completions" in paths
    assert [path for path in paths if path == "/" or path.startswith("/console")] == []


def test_nothing_is_loaded_from_elsewhere() -> None:
    """The policy would stop it; here it is found before a browser is there to look."""
    for name, file in load_files().items():
        text = file.content.decode()
        if name.startswith("vendor/"):
            continue
        outside = [url for url in re.findall(r"https?://[^\s\"'`)]+", text) if "www.w3.org" not in url]
        assert outside == [], name
        for imported in re.findall(r"^import .*?from \"(.*?)\"", text, re.M):
            assert (FOLDER / name).parent.joinpath(imported).is_file(), f"{name} imports {imported}"
    page = (FOLDER / "index.html").read_text()
    for link in re.findall(r'(?:src|href)="(.*?)"', page):
        assert link.removeprefix("console/") in load_files(), link
    assert not re.search(r"<style|style=|<script>|\son\w+=", page), "the policy allows nothing inline"


def test_every_module_says_what_it_is_for() -> None:
    own = [path for path in FOLDER.rglob("*") if path.suffix in (".js", ".css") and path.parent.name != "vendor"]
    for path in own:
        assert path.read_text().startswith(("// ", "/* ")), path.name
        assert len(path.read_text().splitlines()) <= (300 if path.suffix == ".js" else 450), path.name


def test_vendored_files_are_the_published_ones() -> None:
    found = {name: hashlib.sha256((FOLDER / "vendor" / name).read_bytes()).hexdigest() for name in VENDORED}
    assert found == VENDORED
    for licence in ("LICENSE-htm", "LICENSE-preact", "LICENSE-uplot"):
        assert "Copyright" in (FOLDER / "vendor" / licence).read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of setuptools, while it builds
def test_a_wheel_has_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    (source / "src" / "sortserve" / "server").mkdir(parents=True)
    for name in ("pyproject.toml", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    package = source / "src" / "sortserve"
    (package / "__init__.py").write_text('__version__ = "0"\n')
    (package / "server" / "console.py").write_text("")
    shutil.copytree(FOLDER, package / "server" / "console")
    monkeypatch.chdir(source)
    wheel = importlib.import_module("setuptools.build_meta").build_wheel(str(tmp_path))
    names = zipfile.ZipFile(tmp_path / wheel).namelist()
    expected = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert {name.removeprefix("sortserve/server/console/") for name in names if "/console/" in name} == expected
