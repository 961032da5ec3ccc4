"""Pack what a GPU machine without a network lacks, in pieces small enough to carry; tools/install_offline.py installs.

python tools/pack_offline.py OUT [--piece-mib 58] [--gpu 90] [--fat] [--requirements FILE]... [--wheel FILE]...

It downloads the packages of tools/offline_gpu.txt (exact versions, no dependencies), builds the project's wheel, puts
all into one folder, leaves out what tools/offline_leave_out.txt names, empties the GPU code of other architectures
(tools/thin_gpu_code.py; `--fat` keeps it), compresses, and cuts the result into folders OUT/piece-1-of-N, each of at
most the given size with checksums and the installer in it. WORK keeps downloads and compressed libraries: a second
packing takes a fraction of the first. Run it with the Python version of the GPU machine. Needs the standard library and
pip only.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tools.install_offline import MANIFEST, Manifest, Member, PackError, Part, sha256  # noqa: E402
from tools.thin_gpu_code import Malformed, thin  # noqa: E402

LARGE = 8 << 20  # bytes from which a file is compressed by itself, beside the others
_PRESET = 6
_PACKAGE = re.compile(r"([A-Za-z0-9][\w.-]*)==(\d[\w.+!]*)")
_STEP = 1 << 20
_PROJECT = ("stare_megatron", "patches", "docs", "examples", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Packing:
    """What is asked for. `gpus`: architectures whose code is kept, none: all; `piece`: most bytes of a piece."""

    out: Path
    work: Path
    requirements: tuple[Path, ...]
    leave_out: tuple[str, ...]
    wheels: tuple[Path, ...]
    gpus: frozenset[int]
    piece: int
    project: Path | None


def lines(path: Path) -> tuple[str, ...]:
    """The lines of a list, without comments.

    Raises:
        PackError: it cannot be read.
    """
    try:
        return tuple(s for s in (line.partition("#")[0].strip() for line in path.read_text().splitlines()) if s)
    except OSError as e:
        raise PackError(f"{path}: {e.strerror}") from e


def required(path: Path) -> tuple[tuple[str, str], ...]:
    """Name and version of each package of a list.

    Raises:
        PackError: it cannot be read, or has a line that is not NAME==VERSION.
    """
    found = []
    for line in lines(path):
        package = _PACKAGE.fullmatch(line)
        if package is None:
            raise PackError(f"{path}: {line!r} is not NAME==VERSION; packages are packed in exactly one version")
        found.append((package[1], package[2]))
    return tuple(found)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PackError(f"{' '.join(command[1:5])} ...: {(done.stderr or done.stdout).strip()[-1500:]}")


def collect(asked: Packing) -> Path:
    """Download, build and put together; the folder that is to be packed.

    Raises:
        PackError: pip failed; its last lines.
    """
    wheels = asked.work / "wheels"
    names = tuple(f"{name}=={version}" for file in asked.requirements for name, version in required(file))
    stamp = wheels / ".complete"
    if not stamp.is_file() or stamp.read_text() != "\n".join(names):
        wheels.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        if names:
            _pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(wheels), *names)
        stamp.write_text("\n".join(names))
    wanted = {_normal(name): version for name, _, version in (line.partition("==") for line in names)}
    chosen = [w for w in sorted(wheels.glob("*.whl")) if wanted.get(_distribution(w)) == w.name.split("-")[1]]
    if len(chosen) != len(wanted):
        raise PackError(f"{wheels}: {len(chosen)} wheels for {len(wanted)} packages; remove the folder and try again")
    chosen += [*asked.wheels, *([_project_wheel(asked.project, asked.work)] if asked.project else [])]
    site = asked.work / "site"
    shutil.rmtree(site, ignore_errors=True)
    _pip("install", "--no-index", "--no-deps", "--no-compile", "--target", str(site), *map(str, chosen))
    return site


def _distribution(wheel: Path) -> str:
    return _normal(wheel.name.split("-")[0])


def _normal(name: str) -> str:
    return name.replace("_", "-").replace(".", "-").lower()


def _project_wheel(project: Path, work: Path) -> Path:
    """Built from a copy: a build leaves folders behind."""
    copy, out = work / "project", work / "project-wheel"
    for folder in (copy, out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for name in _PROJECT:
        source = project / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    _pip("wheel", "--no-deps", "--wheel-dir", str(out), str(copy))
    (wheel,) = out.glob("*.whl")
    return wheel


def leave_out(site: Path, patterns: tuple[str, ...]) -> int:
    """Remove what matches; bytes freed. Compiled Python files go too."""
    freed = 0
    for path in sorted(site.rglob("*"), reverse=True):
        name = path.relative_to(site).as_posix()
        if path.name == "__pycache__" or any(fnmatch(name, p) or name.startswith(f"{p}/") for p in patterns):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                freed += path.lstat().st_size
                path.unlink()
    return freed


@dataclass(frozen=True)
class _Packed:
    """`file`: compressed; `sha256`: of what comes out of it; `emptied`: bytes of GPU code that became zeros."""

    file: Path
    sha256: str
    emptied: int


def _compress(source: Path, target: Path) -> str:
    total = hashlib.sha256()
    partial = target.with_name(target.name + ".partial")
    with source.open("rb") as plain, lzma.open(partial, "wb", preset=_PRESET) as out:
        while block := plain.read(_STEP):
            total.update(block)
            out.write(block)
    os.replace(partial, target)
    return total.hexdigest()


def _large(path: Path, asked: Packing, cache: Path) -> _Packed:
    """Thin and compress one file, or find that done before."""
    kept = ".".join(map(str, sorted(asked.gpus))) or "all"
    key = f"{sha256(path)[:32]}-{kept}"
    packed, notes = cache / f"{key}.xz", cache / f"{key}.txt"
    if not notes.is_file():
        plain = cache / f"{key}.plain"
        try:
            emptied = thin(path, plain, asked.gpus) if asked.gpus else 0
        except Malformed as e:
            raise PackError(f"{path}: {e}; pack it whole with --fat") from e
        total = _compress(plain if asked.gpus else path, packed)
        plain.unlink(missing_ok=True)
        notes.write_text(f"{total} {emptied}")
    total, emptied = notes.read_text().split()
    return _Packed(packed, total, int(emptied))


def pack(asked: Packing) -> Manifest:
    """Make the pieces; what each of them says of the whole.

    Raises:
        PackError: see `collect`; `out` exists and is not an earlier packing; the pieces are too small to hold anything.
    """
    earlier = list(asked.out.glob("*")) if asked.out.exists() else []
    if any(not (path / MANIFEST).is_file() for path in earlier):
        raise PackError(f"{asked.out}: holds something else than pieces; name another folder")
    began = time.monotonic()
    site = collect(asked)
    print(f"collected in {time.monotonic() - began:.0f} s", flush=True)
    freed = leave_out(site, asked.leave_out)
    print(f"left out {freed / 2**20:.0f} MiB, {_size(site) / 2**20:.0f} MiB stay", flush=True)
    cache = asked.work / "compressed"
    cache.mkdir(parents=True, exist_ok=True)
    large = [p for p in sorted(site.rglob("*")) if p.is_file() and not p.is_symlink() and p.stat().st_size >= LARGE]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        small = pool.submit(_rest, site, frozenset(large), asked.work / "rest.tar.xz")
        packed = list(pool.map(lambda path: _large(path, asked, cache), large))
    members, start = [], 0
    for path, one in [*zip(large, packed, strict=True), (None, small.result())]:
        size = one.file.stat().st_size
        name, mode = (path.relative_to(site).as_posix(), path.stat().st_mode & 0o777) if path else ("", 0)
        members.append(Member(name, start, size, one.sha256, mode))
        start += size
        print(f"  {size / 2**20:6.1f} MiB  {name or 'all else'}, {one.emptied / 2**20:.1f} MiB emptied", flush=True)
    made = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "platform": f"{platform.system()} {platform.machine()}",
        "GPU code": ", ".join(f"sm_{gpu}" for gpu in sorted(asked.gpus)) or "of all architectures",
    }
    names = [p.relative_to(site).as_posix() for p in large]
    thinned = {n: sorted(asked.gpus) for n, one in zip(names, packed, strict=True) if one.emptied}
    return split([p.file for p in (*packed, small.result())], tuple(members), made, thinned, asked)


def _size(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if not p.is_dir())


def _rest(site: Path, without: frozenset[Path], target: Path) -> _Packed:
    """A tar of all other files, the same for the same files, compressed."""
    plain = target.with_suffix("")

    def plainly(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(plain, "w") as tar:
        for path in sorted(site.rglob("*")):
            if path not in without and (path.is_symlink() or not path.is_dir()):
                tar.add(path, path.relative_to(site).as_posix(), recursive=False, filter=plainly)
    total = _compress(plain, target)
    plain.unlink()
    return _Packed(target, total, 0)


def split(
    files: list[Path], members: tuple[Member, ...], made: dict[str, str], thinned: dict[str, list[int]], asked: Packing
) -> Manifest:
    """Cut the files, laid end to end, into the pieces of OUT."""
    installer = HERE / "install_offline.py"
    total = sum(m.size for m in members)

    def manifest(sizes: list[int], sums: list[str]) -> Manifest:
        parts = tuple(Part(f"part-{i + 1}", *both) for i, both in enumerate(zip(sizes, sums, strict=True)))
        return Manifest(parts, members, made, thinned)

    count = 1
    while True:  # a manifest grows with the number of parts
        share = -(-total // count)
        around = len(manifest([share] * count, ["0" * 64] * count).text()) + installer.stat().st_size
        if share + around <= asked.piece:
            break
        if around >= asked.piece:
            raise PackError(
                f"--piece-mib: {around} bytes of each piece are the installer and the manifest; ask for more"
            )
        count += 1
    sizes = [max(0, min(share, total - i * share)) for i in range(count)]
    partial = asked.out.with_name(asked.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    folders = [partial / f"piece-{i + 1}-of-{count}" for i in range(count)]
    sums = _cut(files, [folder / f"part-{i + 1}" for i, folder in enumerate(folders)], sizes)
    whole = manifest(sizes, sums)
    for folder in folders:
        (folder / MANIFEST).write_text(whole.text())
        shutil.copy(installer, folder / installer.name)
    shutil.rmtree(asked.out, ignore_errors=True)
    os.rename(partial, asked.out)
    return whole


def _cut(files: list[Path], targets: list[Path], sizes: list[int]) -> list[str]:
    """Write `sizes[i]` bytes of the files to `targets[i]`; the sum of each."""
    sums, sources = [], iter(files)
    source = next(sources).open("rb")
    try:
        for target, size in zip(targets, sizes, strict=True):
            target.parent.mkdir(parents=True)
            with target.open("wb") as out:
                while size:
                    block = source.read(min(size, _STEP))
                    if block:
                        out.write(block)
                        size -= len(block)
                    else:
                        source.close()
                        source = next(sources).open("rb")
            sums.append(sha256(target))
    finally:
        source.close()
    return sums


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, help="folder for downloads and what can be used again (default: OUT.work)")
    parser.add_argument("--piece-mib", type=float, default=58.0, help="most MiB of a piece (default: 58)")
    parser.add_argument("--gpu", type=int, nargs="+", default=[90], help="architectures to keep (default: 90)")
    parser.add_argument("--fat", action="store_true", help="keep the GPU code of all architectures")
    parser.add_argument(
        "--requirements", type=Path, action="append", help="lists of NAME==VERSION, instead of that one"
    )
    parser.add_argument("--leave-out", type=Path, default=HERE / "offline_leave_out.txt", help="patterns of paths")
    parser.add_argument("--wheel", type=Path, action="append", default=[], help="a wheel to add, e.g. of build_te.sh")
    parser.add_argument("--no-project", action="store_true", help="without this project's own wheel")
    given = parser.parse_args(argv)
    out = given.out.absolute()
    try:
        asked = Packing(
            out=out,
            work=(given.work or out.with_name(out.name + ".work")).absolute(),
            requirements=tuple(given.requirements or [HERE / "offline_gpu.txt"]),
            leave_out=lines(given.leave_out),
            wheels=tuple(given.wheel),
            gpus=frozenset() if given.fat else frozenset(given.gpu),
            piece=int(given.piece_mib * 2**20),
            project=None if given.no_project else HERE.parent,
        )
        made = pack(asked)
    except (PackError, OSError) as e:
        print(f"pack_offline: {e}", file=sys.stderr)
        return 1
    print(f"{len(made.parts)} pieces in {out}, {sum(p.size for p in made.parts) / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
