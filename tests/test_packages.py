"""Packages of npm, fetched from a registry on this machine, by npm where it is installed and without it."""

import functools
import hashlib
import http.server
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drorl.data import packages
from drorl.data.packages import ChecksumError, DownloadError, PinnedTarball, fetch_tarball


def packed() -> bytes:
    """A package as npm publishes it."""
    sink, manifest = io.BytesIO(), json.dumps({"name": "some.json", "version": "1.2.0"}).encode()
    with tarfile.open(fileobj=sink, mode="w:gz") as tar:
        for name, data in {"package/package.json": manifest, "package/data.json": b"[1]"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


CONTENT = packed()
PACKAGE = PinnedTarball("some.json", "1.2.0", hashlib.sha256(CONTENT).hexdigest(), "none")


@pytest.fixture(params=["npm", "without npm"])
def registry(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A registry that holds the package, which both ways of downloading are told of; yields the paths asked for."""
    if request.param == "npm" and shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    served, asked = tmp_path / "served", []
    (served / "some.json" / "-").mkdir(parents=True)
    (served / "some.json" / "-" / PACKAGE.filename).write_bytes(CONTENT)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path != "/some.json":
                return super().do_GET()
            url = f"http://127.0.0.1:{server.server_port}/some.json/-/{PACKAGE.filename}"
            dist = {"tarball": url, "shasum": hashlib.sha1(CONTENT).hexdigest()}
            version = {"name": "some.json", "version": "1.2.0", "dist": dist}
            body = json.dumps({"name": "some.json", "versions": {"1.2.0": version}, "dist-tags": {"latest": "1.2.0"}})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
        monkeypatch.setenv("npm_config_fetch_retries", "0")
        if request.param == "without npm":
            monkeypatch.setattr(packages.shutil, "which", lambda name: None)
        yield asked
        server.shutdown()


def test_a_package_of_npm_is_fetched_once(tmp_path: Path, registry: list[str]) -> None:
    """It comes whole from the registry that npm is told of; what was fetched before is not asked for again."""
    path = fetch_tarball(PACKAGE, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    asked = len(registry)
    assert asked > 0
    assert fetch_tarball(PACKAGE, tmp_path / "cache") == path
    assert len(registry) == asked
    path.write_bytes(b"damaged")
    assert fetch_tarball(PACKAGE, tmp_path / "cache").read_bytes() == CONTENT


def test_another_package_is_refused(tmp_path: Path, registry: list[str]) -> None:
    """A package that is not the pinned one never gets into the cache."""
    pinned = PinnedTarball("some.json", "1.2.0", "0" * 64, "none")
    with pytest.raises(ChecksumError, match=r"some\.json@1\.2\.0 as downloaded has SHA-256"):
        fetch_tarball(pinned, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tgz"))


def test_an_unreachable_registry_says_what_to_do(tmp_path: Path, registry: list[str]) -> None:
    """One line with the reason, the setting and the folder for the file; a file put there is used."""
    missing = PinnedTarball("no.json", "1.0.0", PACKAGE.sha256, "none")
    with pytest.raises(DownloadError) as caught:
        fetch_tarball(missing, tmp_path / "cache")
    folder = tmp_path / "cache" / "packages" / "no.json-1.0.0"
    assert "404" in str(caught.value)
    assert all(hint in str(caught.value) for hint in ("npm pack no.json@1.0.0", "npm_config_registry", str(folder)))
    assert "\n" not in str(caught.value)
    (folder / missing.filename).write_bytes(CONTENT)
    assert fetch_tarball(missing, tmp_path / "cache").read_bytes() == CONTENT
