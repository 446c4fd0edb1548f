"""Downloads from a server on this machine: interrupted, slow, wrong, missing, and teachers that are then used."""

import hashlib
import io
import re
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from mdistiller_norm import download
from mdistiller_norm.cli import main
from mdistiller_norm.engine.teacher_file import known_teacher


class Handler(BaseHTTPRequestHandler):
    """Serves the files of the server; paths choose a behaviour, such as ``/cut/NAME``."""

    def do_GET(self):
        _, behaviour, name = self.path.split("/")
        bounds = self.headers.get("Range", "")
        self.server.requests.append(bounds)
        content = self.server.files.get(name, b"")
        start = int(re.sub(r"\D", "", bounds) or 0) if behaviour != "no_ranges" else 0
        rest = content[start:]
        self.send_response(404 if not content else 416 if not rest else 206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("Content-Range", f"bytes */{len(content)}")
        self.end_headers()
        self.wfile.write(rest[:150_000] if behaviour in ("cut", "slow") else rest)
        if behaviour == "slow" and len(rest) > 150_000:
            time.sleep(1)  # longer than the timeout of the client

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.chdir(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests = {}, []
        server.handle_error = lambda *_: None  # connections that the client has closed
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


def tar(name, content):
    buffer, info = io.BytesIO(), tarfile.TarInfo(name)
    info.size = len(content)
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def fetch(server, name, *paths, **entry):
    entry["urls"] = [f"http://127.0.0.1:{server.server_port}/{path}" for path in paths]
    Path("more.yaml").write_text(yaml.safe_dump({name: [{"to": "files", **entry}]}))
    return main(["fetch", name, "--sources", "more.yaml"])


@pytest.mark.parametrize(("behaviour", "requests"), [("cut", 4), ("slow", 4), ("no_ranges", 1)])
def test_file_arrives_whole(behaviour, requests, server):
    content = server.files["a.bin"] = bytes(range(256)) * 2000  # 512 kB
    part = Path("files/.a.bin.part")
    part.parent.mkdir()
    part.write_bytes(content[:1000])  # of an interrupted command
    digest = hashlib.md5(content).hexdigest()
    assert fetch(server, "a", f"{behaviour}/a.bin", md5=digest, size=len(content)) == 0
    assert Path("files/a.bin").read_bytes() == content
    assert not part.exists()
    assert fetch(server, "a", "plain/a.bin") == 0  # exists: no request
    assert (server.requests[0], len(server.requests)) == ("bytes=1000-", requests)


def test_next_url_is_tried_and_complete_part_is_kept(server):
    content = server.files["b.bin"] = b"right" * 1000
    server.files["old.bin"] = b"wrong" * 1000
    paths, digest = ("plain/none.bin", "plain/old.bin", "plain/b.bin"), hashlib.sha256(content)
    assert fetch(server, "b", *paths, sha256=digest.hexdigest()) == 0
    assert Path("files/none.bin").read_bytes() == content
    Path("files/.b.bin.part").write_bytes(content)
    assert fetch(server, "b", "plain/b.bin") == 0
    assert Path("files/b.bin").read_bytes() == content


@pytest.mark.parametrize(
    ("path", "entry", "words"),
    [
        ("none.bin", {}, "none.bin cannot be downloaded: http://.*HTTP Error 404"),
        ("a.bin", {"md5": "0" * 32}, "its md5 is .*, not 0000"),
        ("a-abcdef12.bin", {}, "its sha256 is .*, not abcdef12"),
        ("a.bin", {"unpack": "a"}, "archive of files/a cannot be unpacked"),
        ("outside.tar", {"unpack": "a"}, "outside the destination"),
        ("a.bin", {"colour": 1}, "more.yaml cannot be read as sources: .*colour"),
        ("a.bin", {"model": "resnet8"}, "must have to: checkpoints, got files"),
    ],
)
def test_failures_are_named_and_leave_nothing(path, entry, words, server, capsys):
    server.files = {"a.bin": b"wrong!", "a-abcdef12.bin": b"x", "outside.tar": tar("../y", b"")}
    assert fetch(server, "a", f"plain/{path}", **entry) == 2
    assert re.fullmatch(rf"error: .*{words}.*\n", capsys.readouterr().err)
    assert not list(Path().glob("files/*"))
    assert not Path("y").exists()


def test_weights_are_listed_found_and_evaluated(server, run, capsys):
    content = (run / "student_last.pt").read_bytes()
    name = f"digits_resnet8-{hashlib.sha256(content).hexdigest()[:8]}.pt"
    server.files[name] = content
    entry = {"to": "checkpoints", "model": "resnet8", "dataset": "digits"}
    assert fetch(server, "mine", f"plain/{name}", **entry) == 0
    line = r"resnet8 +digits  top-1 .*360 images.*checkpoints/digits_resnet8"
    assert re.search(line, capsys.readouterr().out)
    assert known_teacher("resnet8", "digits").path == Path("checkpoints", name)


def test_teachers_of_mdistiller_are_unpacked_where_training_searches(server, capsys):
    path = "cifar_teachers/resnet8_vanilla/ckpt_epoch_240.pth"
    server.files["t.tar"] = tar(path, b"not weights")
    assert fetch(server, "t", "plain/t.tar", to="download_ckpts", unpack="cifar_teachers") == 0
    assert "resnet8: not evaluated, data contains no cifar-100-python" in capsys.readouterr().out
    assert known_teacher("resnet8", "cifar100").path.read_bytes() == b"not weights"
