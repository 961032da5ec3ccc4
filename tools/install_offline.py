"""Install what tools/pack_offline.py packed, on a machine without a network.

python install_offline.py PIECE... [--site FOLDER] [--store FOLDER]

Each piece is a folder; bring them one by one, in any order, or several at a time. A piece is checked and kept in the
store until all are there; then everything is unpacked, checked again, and put in place as a whole. Exit code 0:
installed; 3: parts are missing, which it names; 1: a part is damaged or of another packing, or the disk is full; 2: the
arguments are wrong. Needs Python's standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import os
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
RECORD = "offline.json"  # in the installed folder: where it came from and what was thinned
MISSING = 3
_STEP = 1 << 20


class PackError(Exception):
    """What the user is told: which file, what is wrong with it, what to do."""


@dataclass(frozen=True)
class Part:
    """A piece's share of the payload; `sha256` of its bytes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Member:
    """`size` compressed bytes at `start` of the payload: one file, or with an empty `path` a tar of all others.
    `sha256`: of a file as it is installed, or of the tar; `mode`: its permissions."""

    path: str
    start: int
    size: int
    sha256: str
    mode: int


@dataclass(frozen=True)
class Manifest:
    """What every piece tells of the whole. `made`: of what and for what, as text to show; `thinned`: architectures left
    in each file that lost GPU code."""

    parts: tuple[Part, ...]
    members: tuple[Member, ...]
    made: dict[str, str]
    thinned: dict[str, list[int]]

    def text(self) -> str:
        parts, members = [vars(p) for p in self.parts], [vars(m) for m in self.members]
        content = {"format": FORMAT, "made": self.made, "parts": parts, "members": members, "thinned": self.thinned}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def parse(text: str, where: Path) -> Manifest:
    """A manifest as `Manifest.text` wrote it.

    Raises:
        PackError: it is something else.
    """
    try:
        content: dict[str, Any] = json.loads(text)
        if content["format"] != FORMAT:
            raise PackError(f"{where}: of format {content['format']!r}, this installer knows {FORMAT}")
        return Manifest(
            tuple(Part(**p) for p in content["parts"]),
            tuple(Member(**m) for m in content["members"]),
            content["made"],
            content["thinned"],
        )
    except (ValueError, KeyError, TypeError) as e:
        raise PackError(f"{where}: not the manifest of a piece ({e!r}); carry the piece again") from e


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take(piece: Path, store: Path) -> None:
    """Check the parts of a piece and keep them in the store.

    Raises:
        PackError: no piece, a damaged part, or a piece of another packing than those in the store.
    """
    manifest = piece / MANIFEST
    if not manifest.is_file():
        raise PackError(f"{piece}: no {MANIFEST} in it, so it is not a piece of a packing")
    text = manifest.read_text()
    parts = parse(text, manifest).parts
    kept = store / MANIFEST
    if kept.exists() and kept.read_text() != text:
        raise PackError(
            f"{piece}: of another packing than what {store} holds; empty that folder or name another --store"
        )
    here = [part for part in parts if (piece / part.name).is_file()]
    if not here:
        raise PackError(f"{piece}: none of the parts that its {MANIFEST} names is in it; carry the piece again")
    for part in here:
        source, partial = piece / part.name, store / f"{part.name}.partial"
        shutil.copyfile(source, partial)
        if partial.stat().st_size != part.size or sha256(partial) != part.sha256:
            partial.unlink()
            raise PackError(f"{source}: damaged ({source.stat().st_size} bytes of {part.size}); carry the piece again")
        os.replace(partial, store / part.name)
    partial = store / f"{MANIFEST}.partial"
    partial.write_text(text)
    os.replace(partial, kept)


class _Payload(io.RawIOBase):
    """Bytes `start` to `start + size` of the parts laid end to end."""

    def __init__(self, parts: list[tuple[Path, int]], start: int, size: int) -> None:
        self._parts, self._at, self._left = parts, start, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted, at = min(len(buffer), self._left), self._at
        for path, size in self._parts:
            if at < size:
                with path.open("rb") as file:
                    file.seek(at)
                    got = file.readinto(memoryview(buffer)[: min(wanted, size - at)])
                self._at, self._left = self._at + got, self._left - got
                return got
            at -= size
        return 0


class _Summed(io.RawIOBase):
    """Reads through and sums what was read."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.sum = inner, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read(len(buffer))
        buffer[: len(data)] = data
        self.sum.update(data)
        return len(data)


def _unpack(member: Member, parts: list[tuple[Path, int]], into: Path) -> None:
    raw = io.BufferedReader(_Payload(parts, member.start, member.size), _STEP)
    with lzma.open(raw) as plain:
        summed = _Summed(plain)
        reader = io.BufferedReader(summed, _STEP)
        if member.path:
            target = into / member.path
            if not target.resolve().is_relative_to(into.resolve()):
                raise PackError(f"{member.path!r} leads out of the folder; this is no packing of ours")
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                shutil.copyfileobj(reader, file, _STEP)
            target.chmod(member.mode)
        else:
            with tarfile.open(fileobj=reader, mode="r|") as tar:
                tar.extractall(into, filter="tar")
            while reader.read(_STEP):  # what follows the last file
                pass
    if summed.sum.hexdigest() != member.sha256:
        raise PackError(
            f"{member.path or 'the small files'}: unpacked to something else than was packed; carry it again"
        )


def missing(store: Path, manifest: Manifest) -> list[str]:
    """Names of the parts that are not in the store."""
    return [part.name for part in manifest.parts if not (store / part.name).is_file()]


def install(store: Path, site: Path) -> Manifest:
    """Unpack a complete store to `site`, which appears whole or stays as it was; an earlier installation is replaced.

    Raises:
        PackError: `site` is something else, or what is unpacked is not what was packed.
        OSError: it cannot be written.
    """
    text = (store / MANIFEST).read_text()
    manifest = parse(text, store / MANIFEST)
    if site.exists() and any(site.iterdir()) and not (site / RECORD).is_file():
        raise PackError(f"{site}: exists and was not installed by this; name another --site")
    partial = site.with_name(site.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        parts = [(store / part.name, part.size) for part in manifest.parts]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [pool.submit(_unpack, member, parts, partial) for member in manifest.members]:
                done.result()
        (partial / RECORD).write_text(text)
        _take_place(partial, site)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _take_place(folder: Path, site: Path) -> None:
    """Give a folder the name `site`; what is there goes only once this has succeeded.

    Raises:
        OSError: it cannot be renamed; `site` is as it was.
    """
    stale = site.with_name(site.name + ".stale.partial")
    if stale.exists() and not site.exists():  # an installation was killed between the two renames
        os.rename(stale, site)
    shutil.rmtree(stale, ignore_errors=True)
    try:
        if site.exists():
            os.rename(site, stale)
        os.rename(folder, site)
    finally:
        if stale.exists() and not site.exists():  # the second rename failed
            os.rename(stale, site)
    shutil.rmtree(stale, ignore_errors=True)


def empty(store: Path, manifest: Manifest) -> None:
    """Remove what `take` has put into the store, and the store itself if nothing else is in it.

    Raises:
        OSError: a file cannot be removed.
    """
    for name in (MANIFEST, *(part.name for part in manifest.parts)):
        for file in (store / name, store / f"{name}.partial"):  # of a copy that was cut off
            file.unlink(missing_ok=True)
    if not any(store.iterdir()):
        store.rmdir()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="+", type=Path, metavar="PIECE")
    parser.add_argument(
        "--site", type=Path, default=Path("/opt/site"), help="folder to install to (default: /opt/site)"
    )
    parser.add_argument(
        "--store", type=Path, help="folder that keeps pieces until all are there (default: SITE.pieces)"
    )
    asked = parser.parse_args(argv)
    site = asked.site.absolute()
    store: Path = (asked.store or site.with_name(site.name + ".pieces")).absolute()
    try:
        store.mkdir(parents=True, exist_ok=True)
        for piece in asked.pieces:
            take(piece, store)
        manifest = parse((store / MANIFEST).read_text(), store / MANIFEST)
        names = missing(store, manifest)
        if names:
            print(f"{len(manifest.parts) - len(names)} of {len(manifest.parts)} parts; missing: {', '.join(names)}")
            return MISSING
        install(store, site)
        empty(store, manifest)
    except (PackError, OSError, lzma.LZMAError, EOFError, tarfile.TarError) as e:
        print(f"install_offline: {e}", file=sys.stderr)
        return 1
    print(f"installed to {site}: " + ", ".join(f"{key} {value}" for key, value in manifest.made.items()))
    print(f"put it on the path: export PYTHONPATH=<checkout of stare_megatron>:{site}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
