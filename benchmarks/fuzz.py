"""Damaged and hostile files by the thousand: each is read, or refused with a sentence, in bounded time and memory.

    python benchmarks/fuzz.py                          # 3000 inputs per kind of file
    python benchmarks/fuzz.py --inputs 200 --only .b2nd --seed 7
    python benchmarks/fuzz.py --json benchmarks/results/fuzz.json

Good files of every kind that the package reads are damaged at random (fuzz_mutations.py) and read as the package reads
them (fuzz_targets.py). Success and InputError are the only outcomes that are allowed. Faults are: any other exception,
more than `--seconds` for one input, more than `--gib` of address space beyond the start, a call that starts a program,
connects to anything or loads a library, and a file touched outside of the temporary workspace. Each kind of file has a
process of its own, one after the other, so that one that dies is counted too; inputs that made faults are kept for
looking at with --keep FOLDER.
"""

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind", "ctypes.dlopen",
             "webbrowser.open")
TOUCHING = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
            "shutil.rmtree", "shutil.move", "shutil.copyfile")
READABLE = ("/proc", "/sys", "/dev/null", "/dev/urandom", "/usr", "/etc/localtime", "/etc/mime.types", sys.prefix, sys.base_prefix,
            sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]))


class TooSlow(BaseException):
    """An input took longer than allowed; no `except Exception` may swallow it."""


class Guard:
    """Notes what the code does to the machine while it is `on`, by Python's audit events."""

    def __init__(self, workspace: Path):
        self.on, self.seen = False, Counter()
        self._allowed = (str(workspace), *READABLE)
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            self.seen[f"{event} {arguments[:1]}"[:100]] += 1
        elif event in TOUCHING:
            for path in arguments[:2] if event in ("os.rename", "os.link", "shutil.move") else arguments[:1]:
                # a relative path may be meant for another folder than the present one, which is watched by its listing instead
                if isinstance(path, str | bytes | os.PathLike) and os.path.isabs(name := os.fsdecode(path)) and not self._is_allowed(name):
                    self.seen[f"{event} {name}"[:100]] += 1

    def _is_allowed(self, name: str) -> bool:
        return os.path.normpath(name).startswith(self._allowed)


class Result(NamedTuple):
    """One row of the table."""

    target: str
    inputs: int
    refused: int
    accepted: int
    faults: int
    seconds: float
    slowest_seconds: float
    kinds: dict[str, int]  # of faults


def fuzz(target, inputs: int, seed: int, seconds: float, workspace: Path, guard: Guard | None = None, keep: Path | None = None) -> Result:
    """Damage the files of one target `inputs` times and read them."""
    from pgps_jax.errors import InputError

    rng = random.Random(f"{seed} {target.name}")
    files = target.make(workspace)
    good = {path: path.read_bytes() for path in files}
    target.read(files[0])  # the good ones are accepted, and everything is imported before the guard looks
    refused = accepted = 0
    kinds: Counter[str] = Counter()
    began, slowest = time.monotonic(), 0.0
    for number in range(inputs):
        path = files[number % len(files)]
        content = target.damage(good[path], rng)
        path.write_bytes(content)
        fault, start = None, time.monotonic()
        try:
            with time_limit(seconds), watching(guard):
                target.read(path)
            accepted += 1
        except InputError as error:
            str(error).encode()  # a message must be printable
            refused += 1
        except (Exception, TooSlow) as error:
            fault = f"{type(error).__name__}: {error}"[:120] + f" at {_place(error)}"
        slowest = max(slowest, time.monotonic() - start)
        if guard is not None and guard.seen:
            fault = ", ".join(guard.seen)
            guard.seen.clear()
        if fault:
            kinds[fault] += 1
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{target.name.replace('/', ' ')} {number} {path.name}").write_bytes(content)
        path.write_bytes(good[path])
    return Result(target.name, inputs, refused, accepted, sum(kinds.values()), time.monotonic() - began, slowest, dict(kinds))


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "pgps_jax" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


@contextlib.contextmanager
def time_limit(seconds: float):
    def ring(*_):
        raise TooSlow(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    faulthandler.dump_traceback_later(10 * seconds, exit=True)  # for code that is not Python and never comes back
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def watching(guard: Guard | None):
    if guard is not None:
        guard.on = True
    try:
        yield
    finally:
        if guard is not None:
            guard.on = False


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Names, sizes and times of everything in a folder, to see what libraries do that say nothing to Python."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def limit_memory(gib: float) -> None:
    """No more address space than now and `gib`; what asks for more gets a MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + int(gib * 2**30),) * 2)


def child(name: str, options: argparse.Namespace) -> None:
    """Fuzz one target in this process and write its row to standard output."""
    out = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries complain about damaged files in their own ways
        os.dup2(quiet, stream)
    logging.disable(logging.CRITICAL)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from fuzz_targets import TARGETS

    target = next(target for target in TARGETS if target.name == name)
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        outer = Path(folder).resolve()
        (outer / "workspace").mkdir()
        (outer / "canary").mkdir()
        (outer / "canary/passwd").write_text("untouched")
        os.chdir(outer / "canary")
        before = listing(outer / "canary")
        if options.gib:
            limit_memory(options.gib)
        result = fuzz(target, max(1, int(options.inputs * target.share)), options.seed, options.seconds, outer / "workspace",
                      Guard(outer / "workspace"), options.keep)
        strays = {str(path.relative_to(outer)) for path in outer.iterdir()} - {"workspace", "canary"}
        if strays or listing(outer / "canary") != before:
            result = result._replace(faults=result.faults + 1, kinds={**result.kinds, f"files outside of the workspace: {strays}": 1})
    out.write(json.dumps(result._asdict()))
    out.flush()


def run(name: str, options: argparse.Namespace) -> Result:
    """Fuzz one target in a process of its own."""
    arguments = [sys.executable, __file__, "--child", name, "--inputs", str(options.inputs), "--seed", str(options.seed),
                 "--seconds", str(options.seconds), "--gib", str(options.gib)]
    began = time.monotonic()
    done = subprocess.run([*arguments, *(["--keep", str(options.keep.resolve())] if options.keep else [])], stdout=subprocess.PIPE)
    if done.returncode == 0:
        return Result(**json.loads(done.stdout))
    return Result(name, options.inputs, 0, 0, 1, time.monotonic() - began, 0.0, {f"the process ended with {done.returncode}": 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=3000, help="per kind of file")
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="that one input may take")
    parser.add_argument("--gib", type=float, default=4.0, help="of address space beyond the start")
    parser.add_argument("--keep", type=Path, help="folder for inputs that made faults")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    from fuzz_targets import TARGETS

    print(f"{'target':32}{'inputs':>8}{'refused':>9}{'accepted':>10}{'faults':>8}{'seconds':>9}{'slowest':>9}")
    results = []
    for target in TARGETS:
        if options.only in target.name:
            results.append(row := run(target.name, options))
            print(f"{row.target:32}{row.inputs:8}{row.refused:9}{row.accepted:10}{row.faults:8}{row.seconds:9.1f}{row.slowest_seconds:9.2f}")
            for kind, count in sorted(row.kinds.items(), key=lambda item: -item[1])[:12]:
                print(f"    {count} x {kind}")
            sys.stdout.flush()
    if options.json:
        libraries = {name: version(name) for name in ("numpy", "nibabel", "blosc2", "orbax-checkpoint", "jax")}
        options.json.write_text(json.dumps({
            "seed": options.seed, "seconds_per_input": options.seconds, "gib": options.gib, "python": platform.python_version(),
            "versions": libraries, "targets": [row._asdict() for row in results],
            "total": {key: sum(getattr(row, key) for row in results) for key in ("inputs", "refused", "accepted", "faults", "seconds")},
        }, indent=1) + "\n")
    raise SystemExit(1 if any(row.faults for row in results) else 0)


if __name__ == "__main__":
    main()
