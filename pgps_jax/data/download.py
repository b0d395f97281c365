"""Fetch the public archives of the Medical Segmentation Decathlon: resumed, verified, unpacked safely."""

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pgps_jax.errors import InputError

BASE_URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com"

# MD5 of BASE_URL/<task>.tar, as MONAI publishes them. They tell damaged archives; a forger could meet them, so unpacking
# trusts no member of an archive either.
TASKS = {
    "Task01_BrainTumour": "240a19d752f0d9e9101544901065d872",
    "Task02_Heart": "06ee59366e1e5124267b774dbd654057",
    "Task03_Liver": "a90ec6c4aa7f6a3d087205e23d4e6397",
    "Task04_Hippocampus": "9d24dba78a72977dbd1d2e110310f31b",
    "Task05_Prostate": "35138f08b1efaef89d7424d2bcc928db",
    "Task06_Lung": "8afd997733c7fc0432f71255ba4e52dc",
    "Task07_Pancreas": "4f7080cfca169fa8066d17ce6eb061e4",
    "Task08_HepaticVessel": "641d79e80ec66453921d997fbf12a29c",
    "Task09_Spleen": "410d4a301da4e5b2f6f86ec3ddba524e",
    "Task10_Colon": "bad7a188931dc2f6acf72b08eb6202d0",
}
CHUNK = 2**20
TIMEOUT = 60  # seconds without a byte
_NETWORK = (urllib.error.URLError, http.client.HTTPException, OSError)

Progress = Callable[[int, int], None]  # (MB done, MB in all)


def fetch_msd(task: str, folder: Path, *, base_url: str = BASE_URL, progress: Progress | None = None) -> Path:
    """Download a Decathlon task and unpack it as folder/task; does nothing when it is there.

    What has arrived stays in folder/task.tar.part, and the next call goes on from there. The archive is removed once it
    is unpacked. URLs and MD5 sums are those that MONAI publishes for its public copy of the archives.

    Args:
        task: one of `TASKS`, such as "Task04_Hippocampus".
        progress: called with megabytes, (received, in all).

    Returns:
        folder/task, complete: it appears under this name as the last step.

    Raises:
        InputError: unknown task, network or disk error, too little space, wrong checksum, an archive with members that
            are no plain files under task/.
    """
    if task not in TASKS:
        raise InputError(f"{task!r} is no task of the Medical Segmentation Decathlon; known are {', '.join(TASKS)}")
    output, part, archive = folder / task, folder / f"{task}.tar.part", folder / f"{task}.tar"
    if (output / "dataset.json").is_file():
        return output
    if output.exists():
        raise InputError(f"{output}: exists, but holds no dataset.json; remove it, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            _download(f"{base_url}/{archive.name}", part, progress)
            _verify(part, TASKS[task])
            os.replace(part, archive)
        _verify(archive, TASKS[task])
        _unpack(archive, task, folder / f".{task}.unpacking")
        os.replace(folder / f".{task}.unpacking" / task, output)
        archive.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error}); what was downloaded is kept") from None
    finally:
        shutil.rmtree(folder / f".{task}.unpacking", ignore_errors=True)
    return output


def _download(url: str, part: Path, progress: Progress | None) -> None:
    """Fill `part` from where it ends. A connection that breaks is opened again as long as each one brings something."""
    while True:
        before, error = _size(part), None
        try:
            total = _receive(url, part, progress)
            if total is None or _size(part) >= total:
                return
        except _NETWORK as caught:
            error = caught
        if _size(part) <= before:
            reason = "the connection ended early" if error is None else error
            raise InputError(f"{url}: cannot be downloaded ({reason}); what has arrived is kept in {part}, and the same command goes "
                             "on from there")


def _receive(url: str, part: Path, progress: Progress | None) -> int | None:
    """One connection: append to `part` what it lacks. Returns the length of the whole file, None if the server is silent on it."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return have  # nothing is lacking; the checksum tells whether something is too much
        raise
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # a server that does not resume sends everything again
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        if total is not None:
            _check_space(part, total - have + total)
        try:
            with part.open("ab" if have else "wb") as file:
                while data := _read(response):
                    file.write(data)
                    have += len(data)
                    if progress and total:
                        progress(have // 10**6, total // 10**6)
        except _Disconnected as error:
            raise error.__cause__ from None  # what was received is on the disk now
        except OSError as error:
            raise InputError(f"{part}: cannot be written ({error.strerror}); free some space, then run the same command again") from None
    return total


class _Disconnected(Exception):
    """Reading failed, not writing."""


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except _NETWORK as error:
        raise _Disconnected from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise InputError(f"{path.parent}: needs {needed / 1e9:.1f} GB for the archive and the folder unpacked from it, "
                         f"{free / 1e9:.1f} GB are free")


def _verify(path: Path, md5: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        path.unlink()
        raise InputError(f"{path}: damaged, its MD5 sum is {found} instead of {md5}; it was removed, so run the same command again")


def _unpack(archive: Path, task: str, target: Path) -> None:
    """Unpack plain files and folders under task/ and nothing else."""
    shutil.rmtree(target, ignore_errors=True)
    _check_space(archive, archive.stat().st_size)
    try:
        with tarfile.open(archive, "r:") as tar:  # not compressed, so that it cannot grow
            members = [member for member in tar if _is_wanted(member, task, archive)]
            if sum(member.size for member in members) > archive.stat().st_size:
                raise InputError(f"{archive}: its files would become larger than the archive itself; it is not unpacked")
            tar.extractall(target, members, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{archive}: cannot be unpacked ({error}); remove it and fetch it again") from None
    if not (target / task / "dataset.json").is_file():
        raise InputError(f"{archive}: holds no {task}/dataset.json; it is not what the task should be")


def _is_wanted(member: tarfile.TarInfo, task: str, archive: Path) -> bool:
    """False for what macOS leaves behind; InputError for what has no place in a data set."""
    path = PurePosixPath(member.name)
    if path.name.startswith("._") or path == PurePosixPath("."):
        return False
    if path.parts[0] != task or ".." in path.parts or not (member.isfile() or member.isdir()):
        raise InputError(f"{archive}: its member {member.name!r} is no plain file under {task}/; nothing of it is unpacked")
    return True
