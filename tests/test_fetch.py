"""Downloads from a server on this machine: interrupted, slow, wrong, missing, and teachers that are then used."""

import hashlib
import io
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from mdistiller_norm import download
from mdistiller_norm.cli import main
from mdistiller_norm.engine.teacher_file import known_teacher


class Server(ThreadingHTTPServer):
    """Serves ``files``; paths choose a behaviour, such as ``/cut/NAME``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []  # their ranges

    def handle_error(self, *_: object) -> None:
        """Ignore connections that the client has closed."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
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
        limited = behaviour in ("cut", "slow")
        self.wfile.write(rest[:150_000] if limited else rest)
        if behaviour == "slow" and len(rest) > 150_000:
            time.sleep(1)  # longer than the timeout of the client

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.chdir(tmp_path)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def tar(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def fetch(name: str, *options: str, **entry: object) -> int:
    """Fetch one source, described by a file for --sources."""
    Path("more.yaml").write_text(yaml.safe_dump({name: [{"to": "files", **entry}]}))
    return main(["fetch", name, "--sources", "more.yaml", *options])


@pytest.mark.parametrize("behaviour", ["cut", "slow", "no_ranges"])
def test_file_arrives_whole(behaviour: str, server: Server) -> None:
    content = server.files["a.bin"] = bytes(range(256)) * 2000  # 512 kB
    part = Path("files/.a.bin.part")
    part.parent.mkdir()
    part.write_bytes(content[:1000])  # of an interrupted command
    digest = hashlib.md5(content).hexdigest()
    assert fetch("a", urls=[server.url(f"{behaviour}/a.bin")], md5=digest, size=len(content)) == 0
    assert Path("files/a.bin").read_bytes() == content
    assert server.requests[0] == "bytes=1000-"
    assert len(server.requests) == (1 if behaviour == "no_ranges" else 4)
    assert not part.exists()
    assert fetch("a", urls=[server.url("plain/a.bin")]) == 0  # exists: no request
    assert len(server.requests) == (1 if behaviour == "no_ranges" else 4)


def test_next_url_is_tried_and_complete_part_is_kept(server: Server) -> None:
    content = server.files["b.bin"] = b"right" * 1000
    server.files["old.bin"] = b"wrong" * 1000
    urls = [server.url("plain/none.bin"), server.url("plain/old.bin"), server.url("plain/b.bin")]
    assert fetch("b", urls=urls, sha256=hashlib.sha256(content).hexdigest()) == 0
    assert Path("files/none.bin").read_bytes() == content
    Path("files/.c.bin.part").write_bytes(content)
    server.files["c.bin"] = content
    assert fetch("c", urls=[server.url("plain/c.bin")]) == 0
    assert Path("files/c.bin").read_bytes() == content


@pytest.mark.parametrize(
    ("path", "entry", "words"),
    [
        ("plain/none.bin", {}, "none.bin cannot be downloaded: http://.*HTTP Error 404"),
        ("plain/a.bin", {"md5": "0" * 32}, "its md5 is .*, not 0000"),
        ("plain/a-abcdef12.bin", {}, "its sha256 is .*, not abcdef12"),
        ("plain/a.bin", {"size": 5}, "its size is 6 bytes, not 5"),
        ("plain/a.bin", {"unpack": "a"}, "archive of files/a cannot be unpacked"),
        ("plain/other.tar", {"unpack": "a"}, "cannot be unpacked: .*No such file"),
        ("plain/outside.tar", {"unpack": "a"}, "outside the destination"),
        ("plain/a.bin", {"colour": 1}, "more.yaml cannot be read as sources: .*colour"),
        ("", {}, "urls must be a list of URLs of files"),
        ("plain/a.bin", {"model": "resnet8"}, "must have to: checkpoints, got files"),
    ],
)
def test_failures_are_named_and_leave_nothing(path, entry, words, server, capsys):
    server.files = {"a.bin": b"wrong!", "a-abcdef12.bin": b"x", "other.tar": tar(b=b"")}
    server.files["outside.tar"] = tar(**{"a/x": b"", "../y": b""})
    assert fetch("a", urls=[server.url(path)], **entry) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert len(error.splitlines()) == 1
    assert not list(Path().glob("files/*"))
    assert not Path("y").exists()


def test_weights_are_listed_found_and_evaluated(server, run, capsys):
    content = (run / "student_last.pt").read_bytes()
    name = f"digits_resnet8-{hashlib.sha256(content).hexdigest()[:8]}.pt"
    server.files[name] = content
    entry = {"urls": [server.url(f"cut/{name}")], "to": "checkpoints"}
    entry |= {"model": "resnet8", "dataset": "digits"}
    assert fetch("mine", **entry) == 0
    line = r"resnet8 +digits  top-1 .*360 images.*checkpoints/digits_resnet8"
    assert re.search(line, capsys.readouterr().out)
    teacher = known_teacher("resnet8", "digits")
    assert teacher
    assert teacher.path == Path("checkpoints", name)
    assert fetch("mine", "--no-eval", **entry) == 0
    assert len(yaml.safe_load(Path("checkpoints/manifest.yaml").read_text())) == 1


def test_teachers_of_mdistiller_are_unpacked_where_training_searches(server, capsys):
    path = "cifar_teachers/resnet8_vanilla/ckpt_epoch_240.pth"
    server.files["t.tar"] = tar(**{path: b"not weights"})
    entry = {
        "urls": [server.url("plain/t.tar")],
        "to": "download_ckpts",
        "unpack": "cifar_teachers",
    }
    assert fetch("teachers", **entry) == 0
    assert "resnet8: not evaluated, data contains no cifar-100-python" in capsys.readouterr().out
    teacher = known_teacher("resnet8", "cifar100")
    assert teacher
    assert teacher.path.read_bytes() == b"not weights"
    Path("data/cifar-100-python").mkdir(parents=True)
    assert fetch("teachers", **entry) == 1
    assert "error: download_ckpts/cifar_teachers/resnet8_vanilla" in capsys.readouterr().err
