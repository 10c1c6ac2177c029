"""Weights from anywhere: every form of a source, servers that misbehave, kills, races, and the Hub."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from models import servers
from models.servers import each, file, redirect, refuse, reply
from safetensors.torch import save_file
from support import effdeploy

from deploy.artifacts import CACHE_VARIABLE, cache_folder, read_manifest, sha256_of
from deploy.console import Console, Mode
from deploy.errors import CheckpointError, DownloadError, RecipeError, StorageError
from deploy.models import SYSTEMS, find_system
from deploy.models.answers import _Redirects
from deploy.models.base import load_model
from deploy.models.download import Patience, download
from deploy.models.hub import choose_file
from deploy.models.sources import Source, choose_text, fetch, is_here, parse_source
from deploy.records import Target
from deploy.resolve import recipe_layers, resolve_recipe
from deploy.reuse import weights_identity

BODY = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(2000))  # 64 kB, no two parts alike
SHA = hashlib.sha256(BODY).hexdigest()
OTHER = BODY[::-1]
QUICK = Patience(attempts=3, wait=0.01, timeout=5)
WAIT = 20.0  # seconds until a test gives up on another process


@pytest.fixture
def site():
    with servers.serving() as running:
        yield running


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def get(site, *, sha256=SHA, patience=QUICK, console=None):
    path, got = download(site.url("/w.pth"), "w.pth", sha256, console or Console(Mode.SILENT), patience)
    assert got == sha256_of(path)
    return path


def finished(cache):
    """Files that look finished."""
    return [p for p in cache.glob("*") if p.suffix == ".pth"] if cache.is_dir() else []


# ------------------------------------------------------------------------------------------------------------- grammar


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("w.pth", Source(kind="file", location="w.pth")),
        ("C:\\models\\w.pth", Source(kind="file", location="C:\\models\\w.pth")),
        ("a#b/w.pth#sha256=6741ce71", Source(kind="file", location="a#b/w.pth", sha256="6741ce71")),
        ("random", Source(kind="random")),
        ("random:7", Source(kind="random", seed=7)),
        ("hf://timm/vit", Source(kind="hub", location="timm/vit")),
        ("hf://a/b/c/d.bin", Source(kind="hub", location="a/b", file="c/d.bin")),
        ("hf://a/b@v1.0", Source(kind="hub", location="a/b", revision="v1.0")),
        ("hf://a/b/c.pt@refs/pr/1", Source(kind="hub", location="a/b", file="c.pt", revision="refs/pr/1")),
        ("https://h/w.pth", Source(kind="url", location="https://h/w.pth")),
        ("https://h/w.pth?download=1#top", Source(kind="url", location="https://h/w.pth?download=1")),
        (f"http://h:8/w.pt#sha256={SHA.upper()}", Source(kind="url", location="http://h:8/w.pt", sha256=SHA)),
    ],
)
def test_forms(text, source):
    assert parse_source(text) == source


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected PATH"),
        ("w\n.pth", "expected PATH"),
        ("random:x", "random:SEED"),
        ("random:-1", "random:SEED"),
        ("ftp://h/w.pth", "begins with ftp://"),
        ("s3://h/w.pth", "begins with s3://"),
        ("hf://timm", "hf://OWNER/REPO"),
        ("hf://a/b@", "hf://OWNER/REPO"),
        ("hf://a/b/../c", "hf://OWNER/REPO"),
        ("https:///w.pth", "not a URL"),
        ("https://h:x/w.pth", "not a URL"),
        ("https://h/w x.pth", "not a URL"),
        ("https://me:secret@h/w.pth", "password"),
        ("https://h/download?id=3", "name of a checkpoint"),
        ("https://h/w.pth#sha256=6741", "8 or more"),
        ("https://h/w.pth#sha256=" + 65 * "a", "64 hexadecimal digits"),
        ("w.pth#sha256=g1234567", "64 hexadecimal digits"),
        ("http://h/w.pth", "nothing pins it"),
        ("http://h/w.pth#sha256=6741ce71", "nothing pins it"),
    ],
)
def test_texts_that_are_no_source(text, words):
    with pytest.raises(RecipeError, match=re.escape(words)) as caught:
        parse_source(text)
    assert caught.value.hint
    assert "secret" not in str(caught.value)


def test_pretrained_is_what_the_recipe_names():
    assert choose_text("w.pth", "other.pth", "x s12") == "w.pth"
    assert choose_text("pretrained", "other.pth", "x s12") == "other.pth"
    with pytest.raises(RecipeError, match="x s12 names no pretrained weights"):
        choose_text("pretrained", None, "x s12")
    for circle in ("pretrained", "random:1"):
        with pytest.raises(RecipeError, match="expected a file or an address"):
            choose_text("pretrained", circle, "x s12")


@pytest.mark.parametrize("name", SYSTEMS)
def test_shipped_pretrained_sources_are_pinned_or_at_a_revision(name):
    """OpenMMLab and torchvision put the first digits of the SHA-256 into the file's name; a pin must be those."""
    for variant in find_system(name).variants:
        text = resolve_recipe(name, {"variant": ("", variant)}).pretrained
        if text is None:
            continue
        source = parse_source(text)
        assert source.kind in ("url", "hub")
        assert source.kind == "hub" or source.sha256, text
        digits = re.search(r"-([0-9a-f]{8})\.pth", source.location)
        assert digits is None or source.sha256.startswith(digits[1]), text


def test_the_variants_of_riformer_name_their_release():
    named = recipe_layers("riformer")[-1].variants
    assert {v for v, layer in named.items() if "pretrained" in layer.data} == {"s12", "s24", "s36", "m36", "m48"}


# ------------------------------------------------------------------------------------------------------------ downloads


def test_a_download_is_asked_for_once(site, cache):
    site.answers["/w.pth"] = file(BODY)
    assert get(site).read_bytes() == BODY
    assert get(site) == get(site)
    assert get(site, sha256="") == get(site, sha256=SHA[:8])
    assert len(site.asked) == 1
    assert {p.suffix for p in cache.iterdir()} <= {".pth", ".json", ".lock"}


def test_a_cut_connection_is_gone_on_with(site):
    site.answers["/w.pth"] = each(file(BODY, cut=20_000), file(BODY, cut=10_000), file(BODY))
    assert get(site).read_bytes() == BODY
    assert site.ranges() == ["", "bytes=20000-", "bytes=30000-"]


def test_the_next_run_goes_on_where_one_gave_up(site, cache):
    site.answers["/w.pth"] = each(file(BODY, cut=20_000), refuse(500))
    with pytest.raises(DownloadError, match="gave up after 3 attempts: the server says 500") as caught:
        get(site, sha256="")
    assert caught.value.exit_code == 20
    assert finished(cache) == []
    site.answers["/w.pth"] = file(BODY)
    assert get(site, sha256="").read_bytes() == BODY
    assert site.ranges()[-1] == "bytes=20000-"


def test_a_server_that_ignores_ranges_sends_all_again(site):
    site.answers["/w.pth"] = each(file(BODY, cut=20_000), file(BODY, ranges=False))
    assert get(site).read_bytes() == BODY


@pytest.mark.parametrize("pinned", [SHA, ""])
def test_a_length_that_is_too_long_is_no_whole_file(pinned, site, cache):
    site.answers["/w.pth"] = file(BODY, length=len(BODY) + 7, ranges=False)
    with pytest.raises(DownloadError, match=r"stopped after 64\.0 kB of 64\.0 kB"):
        get(site, sha256=pinned)
    assert finished(cache) == []


def test_a_length_that_is_too_short_is_noticed_by_the_hash(site, cache):
    site.answers["/w.pth"] = file(BODY, length=1000)
    with pytest.raises(DownloadError, match="its sha256 is"):
        get(site)
    assert finished(cache) == []


@pytest.mark.parametrize("digits", [8, 64])
def test_other_content_than_pinned(digits, site, cache):
    site.answers["/w.pth"] = file(OTHER)
    with pytest.raises(DownloadError) as caught:
        get(site, sha256=SHA[:digits])
    assert hashlib.sha256(OTHER).hexdigest() in caught.value.message
    assert SHA[:digits] in caught.value.message
    assert [p.name for p in cache.iterdir() if p.suffix in (".pth", ".partial")] == []
    assert len(site.asked) == 1, "a whole file of another hash is not asked for again"


def test_redirects_are_followed_with_their_range(site):
    site.answers["/w.pth"] = redirect("/a", 301)
    site.answers["/a"] = redirect(site.url("/b"), 307)
    site.answers["/b"] = each(file(BODY, cut=9_000), file(BODY))
    assert get(site).read_bytes() == BODY
    assert site.ranges()[-1] == "bytes=9000-"


@pytest.mark.parametrize("to", ["/w.pth", "/other", "ftp://127.0.0.1/w.pth", "file:///etc/hostname"])
def test_redirects_that_lead_nowhere(to, site):
    site.answers["/w.pth"] = redirect(to)
    site.answers["/other"] = redirect("/w.pth")
    with pytest.raises(DownloadError) as caught:
        get(site)
    assert "redirect" in str(caught.value)
    assert len(site.asked) < 25


def test_https_is_not_left_by_a_redirect():
    request, handler = urllib.request.Request("https://h/w.pth"), _Redirects()
    with pytest.raises(urllib.error.HTTPError, match="redirected from https to http"):
        handler.redirect_request(request, io.BytesIO(), 302, "Found", {}, "http://h/w.pth")
    assert handler.redirect_request(request, io.BytesIO(), 302, "Found", {}, "https://i/w.pth") is not None


@pytest.mark.parametrize(("status", "times"), [(404, 1), (410, 1), (401, 1), (403, 1), (500, 3), (503, 3), (429, 3)])
def test_refusals_are_repeated_only_where_that_may_help(status, times, site, cache):
    site.answers["/w.pth"] = refuse(status)
    with pytest.raises(DownloadError, match=str(status)) as caught:
        get(site)
    assert caught.value.hint
    assert len(site.asked) == times
    assert finished(cache) == []


def test_a_server_that_recovers(site):
    site.answers["/w.pth"] = each(refuse(503), refuse(429), file(BODY))
    assert get(site).read_bytes() == BODY


def test_nobody_answers(cache):
    with servers.serving() as gone:
        url = gone.url("/w.pth")
    with pytest.raises(DownloadError, match="gave up after 3 attempts"):
        download(url, "w.pth", SHA, Console(Mode.SILENT), QUICK)
    assert finished(cache) == []


@pytest.mark.parametrize("heeds", [True, False], ids=["heeds If-Range", "ignores If-Range"])
def test_a_file_that_changes_between_two_attempts(heeds, site):
    site.answers["/w.pth"] = each(file(OTHER, cut=20_000), file(BODY, if_range=heeds))
    assert get(site, sha256="").read_bytes() == BODY


def test_without_a_validator_only_a_pinned_file_is_gone_on_with(site):
    site.answers["/w.pth"] = each(file(BODY, cut=20_000, etag=None), file(BODY, etag=None))
    assert get(site, sha256="").read_bytes() == BODY
    assert site.ranges() == ["", ""]
    site.asked.clear()
    site.answers["/v.pth"] = each(file(BODY, cut=20_000, etag=None), file(BODY, etag=None))
    download(site.url("/v.pth"), "v.pth", SHA, Console(Mode.SILENT), QUICK)
    assert site.ranges() == ["", "bytes=20000-"]


def test_an_old_part_of_another_file_is_thrown_away_once(site):
    site.answers["/w.pth"] = each(file(OTHER, cut=20_000, etag=None), refuse(404))
    with pytest.raises(DownloadError):
        get(site)
    site.answers["/w.pth"] = file(BODY, etag=None)
    assert get(site).read_bytes() == BODY
    assert site.ranges()[-2:] == ["bytes=20000-", ""]


def test_a_part_that_is_longer_than_the_file(site, cache):
    site.answers["/w.pth"] = each(file(BODY, cut=20_000), refuse(404))
    with pytest.raises(DownloadError):
        get(site)
    (part,) = cache.glob("*.partial")
    part.write_bytes(BODY + BODY)
    site.answers["/w.pth"] = file(BODY)
    assert get(site).read_bytes() == BODY


def test_a_kill_between_the_last_byte_and_the_rename(site, cache):
    site.answers["/w.pth"] = each(file(BODY, cut=20_000), refuse(404))
    with pytest.raises(DownloadError):
        get(site)
    (part,) = cache.glob("*.partial")
    part.write_bytes(BODY)
    site.asked.clear()
    assert get(site).read_bytes() == BODY
    assert site.asked == []


NO_FILE = {
    "a web page": lambda h: reply(h, 200, {"Content-Type": "text/html; charset=utf-8", "Content-Length": 4}, b"<a/>"),
    "gzip-compressed": lambda h: reply(h, 200, {"Content-Encoding": "gzip", "Content-Length": 2}, b"\x1f\x8b"),
    "0 bytes": lambda h: reply(h, 200, {"Content-Length": 0}),
    "status 204": lambda h: reply(h, 204, {}),
    "names no length": lambda h: reply(h, 200, {}, BODY),
}


@pytest.mark.parametrize("words", NO_FILE)
def test_answers_that_are_no_file(words, site, cache):
    site.answers["/w.pth"] = NO_FILE[words]
    with pytest.raises(DownloadError, match=words):
        get(site, sha256="")
    assert finished(cache) == []


def test_without_a_length_the_pin_decides(site):
    site.answers["/w.pth"] = NO_FILE["names no length"]
    assert get(site).read_bytes() == BODY


@pytest.mark.parametrize("pinned", [SHA, ""])
def test_chunks_end_with_a_mark(pinned, site):
    site.answers["/w.pth"] = each(servers.chunked(BODY, cut=True), servers.chunked(BODY))
    assert get(site, sha256=pinned).read_bytes() == BODY
    assert len(site.asked) == 2


@pytest.mark.parametrize("pinned", [SHA, ""])
def test_a_cached_file_that_was_changed_is_fetched_again(pinned, site):
    site.answers["/w.pth"] = file(BODY)
    path = get(site, sha256=pinned)
    path.write_bytes(BODY[:-1])
    assert get(site, sha256=pinned).read_bytes() == BODY
    assert len(site.asked) == 2


def test_a_note_that_is_no_json_is_no_note(site, cache):
    site.answers["/w.pth"] = file(BODY)
    path = get(site, sha256="")
    path.with_name(path.name + ".json").write_text("{")
    assert get(site, sha256="").read_bytes() == BODY


def test_a_disk_that_is_too_small_is_told_before_the_download(site, cache):
    site.answers["/w.pth"] = file(BODY, length=10**17)
    with pytest.raises(StorageError, match="needed") as caught:
        get(site)
    assert CACHE_VARIABLE in caught.value.hint
    assert finished(cache) == []


def test_a_cache_folder_that_cannot_be(site, monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "taken"))
    with pytest.raises(StorageError, match="cannot write the download"):
        get(site)


def test_the_cache_folder_is_the_platforms(monkeypatch, tmp_path):
    monkeypatch.delenv(CACHE_VARIABLE)
    for platform, variable in (("linux", "XDG_CACHE_HOME"), ("win32", "LOCALAPPDATA")):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setenv(variable, str(tmp_path))
        assert cache_folder() == tmp_path / "effdeploy"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "effdeploy"


def test_progress_and_retries_are_shown(site, monkeypatch):
    monkeypatch.setattr("deploy.console._PLAIN_PROGRESS_SECONDS", 0.0)
    body = BODY * 40
    site.answers["/w.pth"] = each(file(body, cut=2_000_000), file(body))
    out = io.StringIO()
    get(site, sha256=hashlib.sha256(body).hexdigest(), console=Console(Mode.PLAIN, stdout=out, stderr=out))
    assert "w.pth, MB: 2 of 3" in out.getvalue()
    assert "the server stopped after 2.00 MB of 2.56 MB; going on in" in out.getvalue()
    assert "w.pth, MB: 3 of 3" in out.getvalue()


# ------------------------------------------------------------------------------------------- other processes

DOWNLOAD = """
import sys
from deploy.console import Console, Mode
from deploy.models.download import download
print(download(sys.argv[1], "w.pth", sys.argv[2], Console(Mode.SILENT))[1])
"""


def start(site, sha256):
    command = [sys.executable, "-c", DOWNLOAD, site.url("/w.pth"), sha256]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("pinned", [SHA, ""])
def test_a_killed_download_leaves_no_finished_file_and_is_gone_on_with(pinned, site, cache):
    site.answers["/w.pth"] = file(BODY, pace=0.05)
    process = start(site, pinned)
    deadline = time.monotonic() + WAIT
    while not any(p.stat().st_size for p in cache.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    (part,) = cache.glob("*.partial")
    have = part.stat().st_size
    assert 0 < have < len(BODY)
    assert finished(cache) == []
    site.answers["/w.pth"] = file(BODY)
    assert get(site, sha256=pinned).read_bytes() == BODY
    assert site.ranges()[-1] == f"bytes={have}-"


def test_two_processes_download_a_file_once(site):
    site.answers["/w.pth"] = file(BODY, pace=0.05)
    racers = [start(site, SHA), start(site, SHA)]
    assert [process.communicate(timeout=WAIT)[0].strip() for process in racers] == [SHA, SHA]
    assert len(site.asked) == 1


def test_who_waits_for_another_process_is_told(site, cache):
    site.answers["/w.pth"] = file(BODY, pace=0.1)
    out = io.StringIO()
    first = threading.Thread(target=get, args=(site,))
    first.start()
    while not site.asked:
        time.sleep(0.005)
    get(site, console=Console(Mode.PLAIN, stdout=out, stderr=out))
    first.join()
    assert "another process downloads w.pth; waiting for it" in out.getvalue()
    assert len(site.asked) == 1


# -------------------------------------------------------------------------------------------------------------- the Hub

FETCH = """
import json, sys
from deploy.console import Console, Mode
from deploy.errors import EffdeployError
from deploy.models.sources import fetch, parse_source
for text in sys.argv[1:]:
    try:
        got = fetch(parse_source(text), Console(Mode.SILENT))
        told = {"data": got.path.read_text(), "name": got.name, "source": got.source, "revision": got.revision}
    except EffdeployError as error:
        told = {"error": type(error).__name__, "code": error.exit_code, "text": str(error)}
    print(json.dumps(told))
"""


def from_hub(site, home, *texts, **variables):
    """Fetch in a process of its own: huggingface_hub reads its variables when it is imported."""
    cleared = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    variables = {"HF_ENDPOINT": site.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *texts], env=cleared | variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hub(site, tmp_path):
    servers.hub(site, "a/one", {"README.md": b"-", "model.safetensors": b"safe", "pytorch_model.bin": b"bin"})
    servers.hub(site, "a/only", {"nested/w.pth": b"only", "training_args.bin": b"-", "config.json": b"{}"})
    servers.hub(site, "a/two", {"x.pth": b"x", "y.pth": b"y"})
    servers.hub(site, "a/none", {"README.md": b"-"})
    servers.hub(site, "a/one", {"model.safetensors": b"newer"}, commit=servers.NEWER, branch="v2")
    sha = hashlib.sha256(b"safe").hexdigest()
    one, bin_, v2, at, pinned, other, only, two, none = from_hub(
        site, tmp_path, "hf://a/one", "hf://a/one/pytorch_model.bin", "hf://a/one@v2", f"hf://a/one@{servers.COMMIT}",
        f"hf://a/one#sha256={sha}", f"hf://a/one#sha256={sha[::-1]}", "hf://a/only", "hf://a/two", "hf://a/none",
    )  # fmt: skip
    assert [x["data"] for x in (one, bin_, v2, at, pinned, only)] == ["safe", "bin", "newer", "safe", "safe", "only"]
    assert one["source"] == f"hf://a/one/model.safetensors@{servers.COMMIT}"
    assert one["revision"] == servers.COMMIT
    assert one["name"] == "a/one/model.safetensors at 0123456789ab from the Hugging Face Hub"
    assert v2["revision"] == servers.NEWER
    assert only["source"] == f"hf://a/only/nested/w.pth@{servers.COMMIT}"
    assert (other["code"], sha in other["text"]) == (20, True)
    assert two["code"] == 6
    assert "name one:\n  x.pth\n  y.pth\nhint: --weights hf://a/two/x.pth" in two["text"]
    assert (none["code"], "holds no checkpoint" in none["text"]) == (6, True)


def test_what_the_hub_refuses(site, tmp_path):
    servers.hub(site, "a/b", {"w.pth": b"w"})
    servers.hub(site, "a/gated", {"w.pth": b"w"})
    for path in ("/a/gated/resolve/main/w.pth", "/api/models/a/limited"):
        site.answers[path] = servers.hub_error(403, "GatedRepo")
    site.answers["/a/b/resolve/main/gone.pth"] = servers.hub_error(404, "EntryNotFound")
    for path in ("/a/b/resolve/v9/w.pth", "/api/models/a/b/revision/v9"):
        site.answers[path] = servers.hub_error(404, "RevisionNotFound")
    for path in ("/api/models/a/hidden", "/a/hidden/resolve/main/w.pth"):
        site.answers[path] = servers.hub_error(401, "RepoNotFound")
    site.answers["/api/models/a/broken"] = refuse(500)
    cases = {
        "hf://a/gated/w.pth": "is gated: its authors ask you to agree to their terms",
        "hf://a/limited": "is gated",
        "hf://a/b/gone.pth": "has no file 'gone.pth' at main",
        "hf://a/b@v9": "has no branch, tag or commit 'v9'",
        "hf://a/b/w.pth@v9": "has no branch, tag or commit 'v9'",
        "hf://a/hidden": "no such repository, or a private one",
        "hf://a/hidden/w.pth": "no such repository, or a private one",
        "hf://a/broken": "500",
    }
    for (text, words), told in zip(cases.items(), from_hub(site, tmp_path, *cases), strict=True):
        assert words in told["text"], (text, told)
        assert "hint: " in told["text"]
        assert told["code"] == 20
    (named,) = from_hub(site, tmp_path, "hf://a/-b--c")
    assert named["code"] == 3


def test_tokens_reach_the_hub(site, tmp_path):
    seen = []
    servers.hub(site, "a/b", {"w.pth": b"w"})
    inner = site.answers["/api/models/a/b"]
    site.answers["/api/models/a/b"] = lambda handler: (seen.append(handler.headers["Authorization"]), inner(handler))
    from_hub(site, tmp_path, "hf://a/b", HF_TOKEN="hf_mine")
    assert seen == ["Bearer hf_mine"]


def test_the_hub_without_a_connection(site, tmp_path):
    servers.hub(site, "a/b", {"w.pth": b"w", "README.md": b"-"})
    offline = {"HF_HUB_OFFLINE": "1"}
    (missing,) = from_hub(site, tmp_path, "hf://a/b", **offline)
    assert site.asked == []
    assert missing["code"] == 20
    assert "HF_HUB_OFFLINE is set, and its weights of main is not in the cache" in missing["text"]
    (online,) = from_hub(site, tmp_path, "hf://a/b")
    asked = len(site.asked)
    cached = from_hub(site, tmp_path, "hf://a/b", "hf://a/b/w.pth", online["source"], "hf://a/b/other.pth", **offline)
    assert [x.get("data") for x in cached] == ["w", "w", "w", None]
    assert cached[0] == online
    assert "other.pth of main is not in the cache" in cached[3]["text"]
    assert len(site.asked) == asked
    pinned = from_hub(site, tmp_path, online["source"])
    assert (pinned[0]["data"], len(site.asked)) == ("w", asked), "a commit in the cache needs no connection"


def test_a_file_of_a_repository_is_chosen_only_where_there_is_no_choice():
    assert choose_file("a/b", ["x/model.safetensors", "optimizer.pt", "rng_state_0.pth"]) == "x/model.safetensors"
    many = [f"model-{i:05}-of-00020.safetensors" for i in range(20)]
    with pytest.raises(CheckpointError, match="and 8 more"):
        choose_file("a/b", many)


def test_a_folder_is_taken_for_the_one_checkpoint_in_it(tmp_path):
    """As ``save_pretrained`` leaves it; a pin is one of the file, and a folder that leaves a choice is refused."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no checkpoint") as error:
        fetch(parse_source(str(tmp_path)))
    assert "--weights PATH" in error.value.hint
    for name in ("a.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
        assert fetch(parse_source(str(tmp_path))).path == tmp_path / name
    pinned = f"{tmp_path}#sha256={sha256_of(tmp_path / 'model.safetensors')}"
    assert fetch(parse_source(pinned)).path.name == "model.safetensors"
    with pytest.raises(DownloadError, match="expected 00000000"):
        fetch(parse_source(f"{tmp_path}#sha256=00000000"))
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 checkpoints"):
        fetch(parse_source(str(tmp_path)))


# ------------------------------------------------------------------------------------------------------- down the road

TINY = ("export", "riformer", "--variant", "tiny", "--size", "32", "--until", "engine")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of the tiny RIFormer, and its hash."""
    recipe = resolve_recipe("riformer", {"variant": ("", "tiny")}, ["weights=random:5"])
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    save_file(load_model(find_system("riformer"), recipe, Target.ONNXRUNTIME).reference.state_dict(), path)
    return path, sha256_of(path)


def test_export_from_a_url_and_verify_from_the_record(site, checkpoint, tmp_path):
    path, sha256 = checkpoint
    site.answers["/x.safetensors"] = each(file(path.read_bytes(), cut=50_000), file(path.read_bytes()))
    text, out = f"{site.url('/x.safetensors')}#sha256={sha256}", tmp_path / "bundle"
    result = effdeploy(*TINY, "--weights", text, "--out", out)
    assert result.exit_code == 0, result.stdout + result.stderr
    assert "the server stopped after 50.0 kB of" in result.stdout
    weights = read_manifest(out).model.weights
    assert (weights.kind, weights.sha256, weights.source) == ("url", sha256, text)
    assert weights.statement.startswith(f"weights: x.safetensors from 127.0.0.1 (sha256 {sha256[:12]}, ")
    assert len(site.asked) == 2
    assert effdeploy("verify", out).exit_code == 0
    assert effdeploy("verify", out, "--weights", path).exit_code == 0
    assert len(site.asked) == 2
    changed = f"{site.url('/x.safetensors')}#sha256={sha256[::-1]}"
    result = effdeploy("verify", out, "--weights", changed)
    assert (result.exit_code, "expected " + sha256[::-1] in result.stderr) == (20, True)


def test_convert_and_inspect_take_sources_too(site, checkpoint, tmp_path):
    path, sha256 = checkpoint
    site.answers["/x.safetensors"] = file(path.read_bytes())
    text = f"{site.url('/x.safetensors')}#sha256={sha256}"
    source = parse_source(text)
    assert not is_here(source)
    variant = ("--system", "riformer", "--variant", "tiny")
    result = effdeploy("convert", text, tmp_path / "out.safetensors", *variant)
    assert result.exit_code == 0, result.stdout + result.stderr
    assert is_here(source)
    assert sha256[:12] in effdeploy("inspect", text).stdout
    assert len(site.asked) == 1
    assert effdeploy("inspect", "random").exit_code == 3
    assert effdeploy("inspect", text[:-2] + "zz").exit_code == 3
    changed = f"{site.url('/x.safetensors')}#sha256={sha256[::-1]}"
    assert effdeploy("inspect", changed).exit_code == 20


def test_what_was_not_pinned_is_said_with_the_text_that_pins_it(site, checkpoint):
    """The source is made by hand: as a text, an unpinned address must be https."""
    path, sha256 = checkpoint
    site.answers["/x.safetensors"] = file(path.read_bytes())
    out = io.StringIO()
    unpinned = Source(kind="url", location=site.url("/x.safetensors"))
    got = fetch(unpinned, Console(Mode.PLAIN, stdout=out, stderr=out))
    assert got.name == "x.safetensors from 127.0.0.1, not pinned"
    assert got.source == f"{site.url('/x.safetensors')}#sha256={sha256}"
    assert f"--weights '{got.source}'" in out.getvalue()
    assert str(got.path) in out.getvalue()


def test_errors_of_sources_have_their_exit_codes(site, checkpoint, tmp_path):
    url = site.url("/x.safetensors")
    for text, code, words in (
        (url, 3, "nothing pins it"),
        (f"{url}#sha256={SHA}", 20, "the server says 404"),
        ("ftp://h/w.pth", 3, "begins with ftp://"),
        (f"{checkpoint[0]}#sha256=00000000", 20, "expected 00000000..."),
        ("pretrained", 3, "riformer tiny names no pretrained weights"),
    ):
        result = effdeploy(*TINY, "--weights", text, "--out", tmp_path / "bundle")
        assert (result.exit_code, words in " ".join(result.stderr.split())) == (code, True), result.stderr
        assert not (tmp_path / "bundle").exists()


def test_a_wrong_pin_is_refused_where_the_rest_could_be_reused(checkpoint, tmp_path):
    path, sha256 = checkpoint
    for text, code in ((path, 0), (f"{path}#sha256={sha256[:8]}", 0), (f"{path}#sha256={sha256[::-1]}", 20)):
        result = effdeploy(*TINY[:-1], "model", "--weights", text, "--out", tmp_path / "bundle")
        assert result.exit_code == code, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("text", "identified"),
    [
        (f"https://h/w.pth#sha256={SHA}", True),
        (f"hf://a/b@{servers.COMMIT}", True),
        ("https://h/w.pth#sha256=6741ce71", False),
        ("https://h/w.pth", False),
        ("hf://a/b@main", False),
        ("none.pth", False),
    ],
)
def test_only_what_cannot_change_identifies_weights_without_loading_them(text, identified):
    recipe = resolve_recipe("riformer", {"weights": ("", text)})
    assert (weights_identity(recipe) == weights_identity(recipe)) == identified


def test_a_file_may_be_pinned(checkpoint):
    path, sha256 = checkpoint
    assert fetch(parse_source(f"{path}#sha256={sha256[:8]}")).path == path


def test_pretrained_goes_down_the_road(site, checkpoint, tmp_path):
    path, sha256 = checkpoint
    site.answers["/x.safetensors"] = file(path.read_bytes())
    recipe, out = tmp_path / "mine.yaml", tmp_path / "bundle"
    pretrained = f"{site.url('/x.safetensors')}#sha256={sha256}"
    recipe.write_text(f"system: riformer\nvariant: tiny\nvariants:\n  tiny: {{pretrained: '{pretrained}'}}\n")
    result = effdeploy("export", recipe, "--pretrained", "--until", "model", "--out", out)
    assert result.exit_code == 0, result.stdout + result.stderr
    run = read_manifest(out)
    assert (run.recipe["weights"], run.model.weights.source) == ("pretrained", pretrained)
    result = effdeploy("export", recipe, "--pretrained", "--weights", path, "--out", out)
    assert (result.exit_code, "choose one" in result.stderr) == (2, True)
