"""Resumable downloads with checksums. ``sources.yaml`` lists the known sources and describes their keys."""

import fcntl
import hashlib
import re
import ssl
import tarfile
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import yaml

from mdistiller_norm.engine.runtime import progress
from mdistiller_norm.errors import ConfigError, DataError, first_line

SOURCES = Path(__file__).with_name("sources.yaml")
TIMEOUT = 30.0  # seconds without data
ATTEMPTS = 3  # in a row that receive no data
_NETWORK_ERRORS = (URLError, ConnectionError, TimeoutError, HTTPException, ssl.SSLError)


@dataclass(frozen=True)
class Source:
    """A tar archive with a folder ``unpack``, or the weights of a network."""

    urls: Sequence[str]
    to: str
    size: int = 0
    md5: str = ""
    sha256: str = ""
    unpack: str = ""
    model: str = ""
    dataset: str = ""
    top1: float | None = None

    def __post_init__(self) -> None:
        if not self.urls or not all(re.match(r"\w+://.*[^/]$", url) for url in self.urls):
            raise ValueError(f"urls must be a list of URLs of files, got {self.urls}")

    @property
    def name(self) -> str:
        return self.urls[0].rpartition("/")[2]

    def mismatch(self, path: Path) -> str:
        """Return the difference between a file and the stated size and checksums, or an empty string."""
        if self.size and path.stat().st_size != self.size:
            return f"its size is {path.stat().st_size} bytes, not {self.size}"
        in_name = re.search(r"-([0-9a-f]{8,64})\.\w+$", self.name)
        sha256 = self.sha256 or (in_name[1] if in_name else "")
        for kind, expected in (("md5", self.md5), ("sha256", sha256)):
            with path.open("rb") as file:
                found = hashlib.file_digest(file, kind).hexdigest()
            if not found.startswith(expected.lower()):
                return f"its {kind} is {found}, not {expected}"
        return ""


def read_sources(path: Path = SOURCES) -> dict[str, list[Source]]:
    """Read a file of sources; return them by name."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {name: [Source(**entry) for entry in entries] for name, entries in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as sources: {first_line(error)}") from error


def obtain(source: Source, folder: Path) -> Path:
    """Download a source to a folder and unpack it, unless it exists; return its path.

    An interrupted download continues where it stopped. Several processes may call this function at the same time.
    """
    target, part = folder / (source.unpack or source.name), folder / f".{source.name}.part"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if not target.exists():  # else another process was faster
                _download(source, part)
                if source.unpack:
                    _unpack(part, target)
                else:
                    part.replace(target)
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()
    return target


def _download(source: Source, part: Path) -> None:
    reasons = []
    for url in source.urls:
        try:
            _transfer_all(url, part)
            if not (reason := source.mismatch(part)):
                return
            part.write_bytes(b"")
        except _NETWORK_ERRORS as error:
            reason = first_line(error)
        reasons.append(f"{url}: {reason}")
    hint = "; run the command again to continue" if part.stat().st_size else ""
    raise DataError(f"{source.name} cannot be downloaded: {'; '.join(reasons)}{hint}")


def _transfer_all(url: str, part: Path) -> None:
    failures = 0  # in a row
    while True:
        start = part.stat().st_size
        try:
            return _transfer(url, part, start)
        except HTTPError as error:
            if error.code == 416:  # the part is not smaller than the file: its checksum decides
                return
            raise
        except _NETWORK_ERRORS:
            failures = 0 if part.stat().st_size > start else failures + 1
            if failures == ATTEMPTS:
                raise
            time.sleep(failures)


def _transfer(url: str, part: Path, start: int) -> None:
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with (
        urlopen(request, timeout=TIMEOUT) as response,
        part.open("ab" if response.status == 206 else "wb") as file,  # 206: supports ranges
    ):
        done, name = file.tell(), url.rpartition("/")[2]
        size = done + int(response.headers["Content-Length"] or 0)
        with progress(
            desc=name, total=size or None, initial=done, unit="B", unit_scale=True
        ) as bar:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
        if file.tell() < size:
            raise ConnectionError(
                f"the connection was closed after {file.tell()} of {size} bytes"
            )


def _unpack(archive: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack_") as folder:
        try:
            with tarfile.open(archive) as tar:
                # extractall(filter="data") would require Python 3.11.4.
                for member in tar:
                    source = tar.extractfile(member) if member.isfile() else None
                    path = Path(folder, member.name).resolve()
                    if not path.is_relative_to(Path(folder).resolve()):
                        raise tarfile.TarError(f"{member.name} is outside the destination")
                    if source:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(source.read())
            Path(folder, target.name).rename(target)
        except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
            raise DataError(
                f"archive of {target} cannot be unpacked: {first_line(error)}"
            ) from error
        finally:
            archive.unlink()
