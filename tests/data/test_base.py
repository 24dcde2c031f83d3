"""How a data set's file is found: order of places, hashes, fetching, and what is said when there is nothing."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from attnbook import data
from attnbook.data import Card, DataUnavailable, Source, base
from helpers import bibliography, complains

CONTENT = b"one\ntwo\n"
SHA = hashlib.sha256(CONTENT).hexdigest()
NOWHERE = "http://127.0.0.1:9/words.txt"


def toy(*, url: str = NOWHERE, **source) -> Card:
    return Card(
        name="toy",
        title="Toy",
        content="two words",
        licence="none stated",
        citation=(),
        home="https://example.org",
        returns="bytes",
        sources=(Source(**{"name": "words.txt", "sha256": SHA, "url": url, **source}),),
    )


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Give a data folder, a cache and a package folder, all of them empty."""
    folders = {name: tmp_path / name for name in ("data", "cache", "package")}
    monkeypatch.setenv("ATTNBOOK_DATA", str(folders["data"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders["cache"]))
    monkeypatch.setattr(
        base.sysconfig, "get_paths", lambda: dict.fromkeys(("purelib", "platlib"), str(folders["package"]))
    )
    return folders


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_places_are_tried_in_order(places, monkeypatch):
    card = toy(member="package/words.txt", package="toy-package==1.0")
    for_place = {
        "package": places["package"] / "package/words.txt",
        "cache": places["cache"] / "attnbook/toy/words.txt",
        "data": places["data"] / "toy/words.txt",
    }
    read = []
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self) or original(self))
    for name in for_place:  # each new place comes before those filled so far
        put(for_place[name], CONTENT)
        assert card.read("words.txt") == CONTENT
        assert read[-1] == for_place[name]


def test_without_the_variable_the_cache_comes_first(places, monkeypatch):
    put(places["data"] / "toy/words.txt", b"never looked at")
    put(places["cache"] / "attnbook/toy/words.txt", CONTENT)
    monkeypatch.delenv("ATTNBOOK_DATA")
    assert toy().read("words.txt") == CONTENT


def test_a_file_may_lie_packed(places):
    put(places["data"] / "toy/words.txt.gz", gzip.compress(CONTENT))
    assert toy().read("words.txt") == CONTENT


def test_a_file_whose_name_ends_in_gz_is_not_unpacked(places):
    packed = gzip.compress(CONTENT, mtime=0)
    put(places["data"] / "toy/words.gz", packed)
    card = toy(name="words.gz", sha256=hashlib.sha256(packed).hexdigest())
    assert card.read("words.gz") == packed


@pytest.mark.parametrize("place", ["data", "cache"])
def test_another_content_is_refused_wherever_it_lies(places, place):
    path = places[place] / ("attnbook/toy" if place == "cache" else "toy") / "words.txt"
    put(path, b"one\nthree\n")
    found = hashlib.sha256(b"one\nthree\n").hexdigest()
    with complains(f"{path}: expected content with SHA-256 {SHA}, got {found}"):
        toy().read("words.txt")


def test_an_unknown_file_is_a_key_error(places):
    with pytest.raises(KeyError, match=r"toy has no file 'verbs.txt'"):
        toy().read("verbs.txt")


def test_without_network_and_data_the_error_says_what_helps(places):
    with pytest.raises(DataUnavailable) as caught:
        toy(member="package/words.txt", package="toy-package==1.0").read("words.txt")
    assert str(caught.value) == (
        f"toy: words.txt is not on this machine, and {NOWHERE} cannot be reached (ConnectionError). "
        "Any of these helps: "
        f"put it at $ATTNBOOK_DATA/toy/words.txt (now {places['data']}); "
        "install the package that ships it: pip install --no-deps toy-package==1.0; "
        f"run once with a network: it is then kept in {places['cache']}/attnbook."
    )


def test_a_name_that_does_not_resolve_is_no_crash_either(places, monkeypatch):
    monkeypatch.delenv("ATTNBOOK_DATA")
    with pytest.raises(DataUnavailable, match=r"cannot be reached .* \(now not set\); run once with a network"):
        toy(url="http://attnbook.invalid/words.txt").read("words.txt")


def test_without_pooch_the_error_says_so(places, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DataUnavailable, match="and the package pooch, which fetches it, is not installed"):
        toy().read("words.txt")


@pytest.mark.parametrize("name", data.names())
def test_every_loader_says_what_helps(name, places):
    # scan is made from its grammar; its splits need files.
    options = {"split": "simple"} if name == "scan" else {}
    with pytest.raises(DataUnavailable, match=f"^{name}: .* is not on this machine"):
        data.load(name, **options)


@pytest.fixture
def server():
    """Serve some files on this machine, and count the requests."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/words.txt", CONTENT)
        archive.writestr("package/other.txt", b"other")
    files = {"/words.txt": CONTENT, "/wrong.txt": b"wrong", "/toy.whl": wheel.getvalue()}

    class Handler(BaseHTTPRequestHandler):
        asked: list[str] = []

        def do_GET(self):
            self.asked.append(self.path)
            content = files.get(self.path)
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=partial(running.serve_forever, poll_interval=0.01), daemon=True)
        thread.start()
        running.address = f"http://127.0.0.1:{running.server_port}"
        running.wheel_sha256 = hashlib.sha256(wheel.getvalue()).hexdigest()
        running.asked = Handler.asked
        yield running
        running.shutdown()
        thread.join()


def test_a_file_is_fetched_once_and_kept(places, server):
    card = toy(url=f"{server.address}/words.txt")
    assert card.read("words.txt") == CONTENT
    assert (places["cache"] / "attnbook/toy/words.txt").read_bytes() == CONTENT
    assert card.read("words.txt") == CONTENT
    assert server.asked == ["/words.txt"]


def test_a_member_of_a_wheel_is_fetched_once_and_kept(places, server):
    card = toy(url=f"{server.address}/toy.whl", member="package/words.txt", archive_sha256=server.wheel_sha256)
    assert card.read("words.txt") == CONTENT
    assert card.read("words.txt") == CONTENT
    assert server.asked == ["/toy.whl"]


def test_a_plain_file_that_a_package_ships_too_is_fetched_as_it_is(places, server):
    card = toy(url=f"{server.address}/words.txt", member="package/words.txt", package="toy-package==1.0")
    assert card.read("words.txt") == CONTENT


def test_what_is_fetched_is_checked(places, server):
    with pytest.raises(ValueError, match="does not match the known hash"):
        toy(url=f"{server.address}/wrong.txt").read("words.txt")
    wrong = toy(url=f"{server.address}/toy.whl", member="package/other.txt", archive_sha256=server.wheel_sha256)
    with pytest.raises(ValueError, match="expected content with SHA-256"):
        wrong.read("words.txt")


def test_an_address_that_is_gone_is_no_network_either(places, server):
    with pytest.raises(DataUnavailable, match=r"gone.txt cannot be reached \(HTTPError\)"):
        toy(url=f"{server.address}/gone.txt").read("words.txt")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert base.cache_folder() == tmp_path / "attnbook"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert base.cache_folder() == tmp_path / ".cache" / "attnbook"


@pytest.mark.parametrize("name", data.names())
def test_a_card_is_complete(name):
    card = data.card(name)
    assert card.name == name
    for field in ("title", "content", "licence", "home", "returns"):
        assert getattr(card, field).strip(), field
    assert card.home.startswith("http")
    assert card.citation
    assert set(card.citation) <= bibliography()
    assert card.sources
    assert len({source.name for source in card.sources}) == len(card.sources)
    for source in card.sources:
        assert len(bytes.fromhex(source.sha256)) == 32
        assert source.url.startswith("https://")
        if source.url.endswith(".whl"):
            assert source.member
            assert source.package
            assert len(bytes.fromhex(source.archive_sha256)) == 32
        else:
            assert not source.archive_sha256  # the file itself is at the address
        if source.package:
            assert source.member


def test_cards_and_loaders_belong_together():
    from attnbook.data import _MODULES, _module

    for module in set(_MODULES.values()):
        names = {name for name, where in _MODULES.items() if where == module}
        found = _module(next(iter(names)))
        assert set(found.CARDS) == set(found.LOADERS) == names


def test_unknown_names_are_named():
    with complains("name: expected one of 'bible-alignments', …, 'tinyshakespeare', got 'imagenet'"):
        data.load("imagenet")
    with complains("name: expected one of …, got 'imagenet'"):
        data.card("imagenet")
