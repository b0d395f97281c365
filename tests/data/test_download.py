"""Archives fetched from a server on this machine: whole, resumed, damaged, forged."""

import hashlib
import io
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pgps_jax.data import download
from pgps_jax.data.download import TASKS, fetch_msd
from pgps_jax.errors import InputError

TASK = "Task04_Hippocampus"
FILES = {f"{TASK}/dataset.json": b"{}", f"{TASK}/imagesTr/a.nii.gz": bytes(range(256)) * 200, f"{TASK}/._junk": b"macOS"}


def archive_of(files=FILES, *, extra=()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for entry in extra:
            tar.addfile(entry)
    return buffer.getvalue()


class Server:
    """One archive at every address; `resumes` answers ranges, `cut` ends each connection after so many bytes."""

    def __init__(self):
        self.content, self.resumes, self.cut, self.ranges = archive_of(), True, None, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                server.ranges.append(self.headers.get("Range"))
                start = int(asked[1]) if asked and server.resumes else 0
                if server.content is None:
                    self.send_error(404)
                elif start >= len(server.content):
                    self.send_error(416)
                else:
                    body = server.content[start:]
                    self.send_response(206 if start else 200)
                    if start:
                        self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: server.cut])

            def log_message(self, *_):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setitem(TASKS, TASK, hashlib.md5(server.content).hexdigest())
    yield server
    server.http.shutdown()
    server.http.server_close()


def serve(server, monkeypatch, content: bytes):
    """Another archive, with the checksum that it has."""
    server.content = content
    monkeypatch.setitem(TASKS, TASK, hashlib.md5(content).hexdigest())


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


COMPLETE = [f"{TASK}/dataset.json", f"{TASK}/imagesTr/a.nii.gz"]


def test_a_task_is_fetched_once_and_leaves_nothing_but_its_files(server, tmp_path):
    seen = []
    folder = fetch_msd(TASK, tmp_path / "new", base_url=server.url, progress=lambda *done: seen.append(done))
    assert folder == tmp_path / "new" / TASK and names(tmp_path / "new") == COMPLETE and seen
    assert (folder / "imagesTr/a.nii.gz").read_bytes() == FILES[f"{TASK}/imagesTr/a.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [TASK]
    assert fetch_msd(TASK, tmp_path / "new", base_url=server.url) == folder and server.ranges == [None]


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize("have", [5000, None])
def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path, resumes, have):
    server.resumes = resumes
    start = server.content[:have]
    (tmp_path / f"{TASK}.tar.part").write_bytes(start)
    fetch_msd(TASK, tmp_path, base_url=server.url)
    assert names(tmp_path) == COMPLETE and server.ranges == [f"bytes={len(start)}-"]


def test_broken_connections_are_opened_again_as_long_as_they_bring_something(server, tmp_path):
    server.cut = 20_000
    fetch_msd(TASK, tmp_path, base_url=server.url)
    assert names(tmp_path) == COMPLETE
    assert server.ranges == [None] + [f"bytes={n}-" for n in range(20_000, len(server.content), 20_000)]


def test_what_has_arrived_is_kept_when_nothing_more_comes(server, tmp_path):
    (tmp_path / f"{TASK}.tar.part").write_bytes(server.content[:5000])
    server.cut = 0
    with pytest.raises(InputError, match=r"ended early.*goes on"):
        fetch_msd(TASK, tmp_path, base_url=server.url)
    assert (tmp_path / f"{TASK}.tar.part").stat().st_size == 5000
    server.content = None
    with pytest.raises(InputError, match="404"):
        fetch_msd(TASK, tmp_path, base_url=server.url)
    with pytest.raises(InputError, match="cannot be downloaded"):
        fetch_msd(TASK, tmp_path, base_url="http://127.0.0.1:1")


def test_an_archive_with_another_checksum_is_not_unpacked_and_not_kept(server, tmp_path):
    server.content = server.content[:-1] + b"x"
    with pytest.raises(InputError, match=f"MD5 sum is {hashlib.md5(server.content).hexdigest()} instead of"):
        fetch_msd(TASK, tmp_path, base_url=server.url)
    assert names(tmp_path) == []


def member(name: str, **changes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    for key, value in changes.items():
        setattr(entry, key, value)
    return entry


@pytest.mark.parametrize("bad", [
    member("../outside"), member(f"{TASK}/../../outside"), member("/outside"), member("elsewhere/file"),
    member(f"{TASK}/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    member(f"{TASK}/link", type=tarfile.LNKTYPE, linkname=f"{TASK}/dataset.json"),
    member(f"{TASK}/device", type=tarfile.CHRTYPE), member(f"{TASK}/pipe", type=tarfile.FIFOTYPE),
], ids=lambda entry: f"{entry.name}-{entry.type.decode()}")  # fmt: skip
def test_nothing_is_unpacked_of_an_archive_with_a_member_that_has_no_place_in_it(server, tmp_path, monkeypatch, bad):
    serve(server, monkeypatch, archive_of(extra=[bad]))
    with pytest.raises(InputError, match="is no plain file under"):
        fetch_msd(TASK, tmp_path / "in", base_url=server.url)
    assert names(tmp_path) == [f"in/{TASK}.tar"]


@pytest.mark.parametrize("content, message", [
    (b"no archive" * 100, "cannot be unpacked"),
    (archive_of({f"{TASK}/readme": b""}), "holds no Task04_Hippocampus/dataset.json"),
    (archive_of(FILES, extra=[member(f"{TASK}/bomb", pax_headers={
        "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**50)})]), "larger than"),
], ids=["no archive", "no dataset", "bomb"])  # fmt: skip
def test_an_archive_that_is_none_or_would_fill_the_disk_is_refused(server, tmp_path, monkeypatch, content, message):
    serve(server, monkeypatch, content)
    with pytest.raises(InputError, match=message):
        fetch_msd(TASK, tmp_path, base_url=server.url)
    assert not (tmp_path / TASK).exists()


def test_too_little_space_is_said_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"needs 0\.0 GB for the archive"):
        fetch_msd(TASK, tmp_path, base_url=server.url)
    assert names(tmp_path) == []


def test_an_unknown_task_lists_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"'Task11_Brain' is no task.*Task01_BrainTumour.*Task10_Colon"):
        fetch_msd("Task11_Brain", tmp_path)


def test_a_folder_in_the_way_is_not_touched(server, tmp_path):
    (tmp_path / TASK).mkdir()
    with pytest.raises(InputError, match=r"holds no dataset\.json"):
        fetch_msd(TASK, tmp_path, base_url=server.url)
