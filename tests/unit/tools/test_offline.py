"""Packing and installing without a network: synthetic wheels, through pip, the cut, the journey and the installer."""

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.unit.tools.elf import CODE, library
from tools import install_offline, pack_offline
from tools.install_offline import MANIFEST, MISSING, RECORD, PackError, parse
from tools.pack_offline import lines

SLOT = 4 << 10
LIBRARY = library([[(CODE, 80, random.Random(1).randbytes(40_000)), (CODE, 90, random.Random(2).randbytes(3000))]])


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A wheel of version 1.0 that pip installs."""
    about = f"{name}-1.0.dist-info"
    content = files | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for path, data in content.items()
    )
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as made:
        for path, data in (content | {f"{about}/RECORD": f"{record}{about}/RECORD,,\n".encode()}).items():
            made.writestr(zipfile.ZipInfo(path), data)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    """Wheels, and the lists that ask for them."""
    folder = tmp_path_factory.mktemp("index")
    noise = random.Random(0).randbytes
    wheel(
        folder,
        "alpha",
        {"alpha/__init__.py": b"word = 'alpha'\n", "alpha/lib.so": LIBRARY, "alpha/big.js": noise(50_000)},
    )
    wheel(folder, "beta", {"beta.py": b"import alpha\nword = alpha.word\n", "data/noise.bin": noise(80_000)})
    (folder / "requirements.txt").write_text("# ours\nalpha==1.0  # with a library\n\nbeta==1.0\n")
    (folder / "leave_out.txt").write_text("alpha/*.js\n")
    return folder


@pytest.fixture(autouse=True)
def this_index(index, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    # From where on a file is compressed by itself, scaled to these wheels.
    monkeypatch.setattr(pack_offline, "LARGE", 20_000)


def pack(index: Path, out: Path, *words: str, kib: float = 40.0) -> int:
    lists = ["--requirements", str(index / "requirements.txt"), "--leave-out", str(index / "leave_out.txt")]
    return pack_offline.main([str(out), *lists, "--no-project", "--piece-mib", str(kib / 1024), *words])


@pytest.fixture(scope="module")
def pieces(index, tmp_path_factory) -> list[Path]:
    """One packing, made once, by pip."""
    out = tmp_path_factory.mktemp("packed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(index))
        patch.setattr(pack_offline, "LARGE", 20_000)
        assert pack(index, out) == 0
    return sorted(out.iterdir())


@pytest.fixture
def quickly(index, monkeypatch) -> None:
    """For further packings: what pip does to these wheels, without its seconds."""

    def pip(verb: str, *arguments: str) -> None:
        target = Path(arguments[arguments.index("--dest" if verb == "download" else "--target") + 1])
        for file in index.glob("*.whl"):
            if verb == "download":
                shutil.copy(file, target)
            else:
                zipfile.ZipFile(file).extractall(target)

    monkeypatch.setattr(pack_offline, "_pip", pip)


def install(site: Path, *pieces: Path) -> int:
    """By the installer that the piece carries, with the interpreter alone."""
    script = pieces[0] / "install_offline.py"
    command = [sys.executable, "-I", "-S", str(script), *map(str, pieces), "--site", str(site)]
    return subprocess.run(command, check=False).returncode


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_pieces_keep_to_the_size_and_know_the_whole(pieces):
    assert len(pieces) >= 3
    assert [p.name for p in pieces] == [f"piece-{i + 1}-of-{len(pieces)}" for i in range(len(pieces))]
    for number, piece in enumerate(pieces, 1):
        assert {f.name for f in piece.iterdir()} == {MANIFEST, "install_offline.py", f"part-{number}"}
        assert sum(f.stat().st_size for f in piece.iterdir()) <= 40 * 1024
    assert len({(p / MANIFEST).read_text() for p in pieces}) == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_any_order_one_by_one(pieces, tmp_path, order):
    site = tmp_path / "site"
    *first, last = [pieces[i] for i in order] + pieces[3:]
    for piece in first:
        assert install(site, piece) == MISSING
        assert not site.exists()
    assert install(site, first[0]) == MISSING  # once more changes nothing
    assert install(site, last) == 0
    found = content(site)
    assert {"alpha/__init__.py", "beta.py", "data/noise.bin", "alpha/lib.so", RECORD} <= found.keys()
    assert "alpha/big.js" not in found
    assert found["data/noise.bin"] == random.Random(0).randbytes(130_000)[50_000:]
    assert not (tmp_path / "site.pieces").exists()
    environment = {"PYTHONPATH": str(site), "PATH": os.environ["PATH"]}
    code = "import beta; print(beta.word)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "alpha\n"


def test_all_at_once_over_an_earlier_one(pieces, tmp_path):
    site = tmp_path / "site"
    assert install(site, *pieces) == 0
    (site / "stale.py").touch()
    assert install(site, *pieces) == 0
    assert not (site / "stale.py").exists()


def test_gpu_code_was_thinned_and_it_says_so(pieces, tmp_path):
    site = tmp_path / "site"
    assert install(site, *pieces) == 0
    got = (site / "alpha/lib.so").read_bytes()
    assert len(got) == len(LIBRARY)
    assert got.count(0) > LIBRARY.count(0) + 39_000
    record = parse((site / RECORD).read_text(), site)
    assert record.thinned == {"alpha/lib.so": [90]}
    assert record.made["GPU code"] == "sm_90"


def test_fat_keeps_all_gpu_code(quickly, index, tmp_path):
    assert pack(index, tmp_path / "out", "--fat", kib=400) == 0
    (piece,) = (tmp_path / "out").iterdir()
    assert install(tmp_path / "site", piece) == 0
    assert (tmp_path / "site/alpha/lib.so").read_bytes() == LIBRARY
    assert parse((tmp_path / "site" / RECORD).read_text(), tmp_path).thinned == {}


def test_a_second_packing_is_the_same_and_compresses_no_library_again(quickly, index, tmp_path, monkeypatch):
    assert pack(index, tmp_path / "out") == 0
    first = content(tmp_path / "out")
    monkeypatch.setattr(pack_offline, "thin", None)
    assert pack(index, tmp_path / "out") == 0
    assert content(tmp_path / "out") == first


def copies(pieces: list[Path], folder: Path) -> list[Path]:
    return [Path(shutil.copytree(p, folder / p.name)) for p in pieces]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "no manifest", "manifest"])
def test_a_damaged_piece_is_named_and_can_be_carried_again(pieces, tmp_path, capfd, damage):
    site = tmp_path / "site"
    carried = copies(pieces, tmp_path / "carried")
    part = carried[1] / "part-2"
    if damage == "flipped":
        data = bytearray(part.read_bytes())
        data[len(data) // 2] ^= 1
        part.write_bytes(data)
    elif damage == "cut":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "gone":
        part.unlink()
    elif damage == "no manifest":
        (carried[1] / MANIFEST).unlink()
    else:
        (carried[1] / MANIFEST).write_text("{}")
    assert install(site, *carried) == 1
    assert str(carried[1]) in capfd.readouterr().err
    assert not site.exists()
    rest = [carried[0], pieces[1], *pieces[2:]]
    assert install(site, *rest) == 0


def test_pieces_of_two_packings_do_not_mix(quickly, index, pieces, tmp_path, capfd):
    assert pack(index, tmp_path / "other", "--gpu", "80") == 0
    site = tmp_path / "site"
    assert install(site, pieces[0]) == MISSING
    assert install(site, sorted((tmp_path / "other").iterdir())[1]) == 1
    assert "another packing" in capfd.readouterr().err


def test_folders_of_others_are_left_alone(index, pieces, tmp_path, capfd):
    site = tmp_path / "site"
    site.mkdir()
    (site / "theirs.txt").write_text("keep")
    assert install(site, *pieces) == 1
    assert "was not installed by this" in capfd.readouterr().err
    assert content(site) == {"theirs.txt": b"keep"}
    assert pack(index, site) == 1
    assert content(site) == {"theirs.txt": b"keep"}


def test_a_store_that_holds_files_of_others_keeps_them(pieces, tmp_path):
    store = tmp_path / "store"
    (store / "inner").mkdir(parents=True)
    (store / "theirs.txt").write_text("keep")
    assert install_offline.main([*map(str, pieces), "--site", str(tmp_path / "site"), "--store", str(store)]) == 0
    assert content(store) == {"theirs.txt": b"keep"}
    assert (store / "inner").is_dir()


def test_a_rename_that_fails_leaves_the_earlier_installation(pieces, tmp_path, monkeypatch, capfd):
    site = tmp_path / "site"
    assert install(site, *pieces) == 0
    first, rename = content(site), os.rename

    def fails(source, target) -> None:
        if Path(source).name == "site.partial":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(install_offline.os, "rename", fails)
    assert install_offline.main([*map(str, pieces), "--site", str(site)]) == 1
    assert "install_offline: no" in capfd.readouterr().err
    assert content(site) == first
    assert {p.name for p in tmp_path.iterdir()} == {"site", "site.pieces"}


def test_paths_that_lead_out_are_refused(pieces, tmp_path, capfd):
    carried = copies(pieces, tmp_path / "carried")
    for piece in carried:
        text = json.loads((piece / MANIFEST).read_text())
        text["members"][0]["path"] = "../outside.so"
        (piece / MANIFEST).write_text(json.dumps(text))
    assert install(tmp_path / "site", *carried) == 1
    assert "leads out" in capfd.readouterr().err
    assert not (tmp_path / "outside.so").exists()


@pytest.mark.parametrize(
    "line", ["alpha", "alpha>=1.0", "alpha==", "==1.0", "alpha @ file:///alpha.whl", "-r more.txt"]
)
def test_a_requirement_without_its_version_is_named(index, tmp_path, capsys, line):
    (tmp_path / "list.txt").write_text(f"beta==1.0\n{line}\n")
    assert pack(index, tmp_path / "out", "--requirements", str(tmp_path / "list.txt")) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "list.txt") in said
    assert repr(line) in said


def test_pieces_too_small_for_the_installer(quickly, index, tmp_path, capsys):
    assert pack(index, tmp_path / "out", kib=4) == 1
    assert "--piece-mib" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [[0], [1], [5, 0, 3], [100, 7], [64] * 9])
@pytest.mark.parametrize("parts", [1, 2, 4, 5, 7])
def test_cut_and_joined(tmp_path, sizes, parts):
    files = []
    for i, size in enumerate(sizes):
        files.append(tmp_path / f"file{i}")
        files[-1].write_bytes(random.Random(i).randbytes(size))
    total = sum(sizes)
    share = -(-total // parts)
    lengths = [max(0, min(share, total - i * share)) for i in range(parts)]
    targets = [tmp_path / f"piece{i}" / "part" for i in range(parts)]
    sums = pack_offline._cut(files, targets, lengths)
    whole = b"".join(f.read_bytes() for f in files)
    assert b"".join(t.read_bytes() for t in targets) == whole
    assert sums == [hashlib.sha256(t.read_bytes()).hexdigest() for t in targets]
    laid = [(t, n) for t, n in zip(targets, lengths, strict=True)]
    for start in range(0, total, 5):
        payload = install_offline._Payload(laid, start, min(13, total - start))
        assert payload.readall() == whole[start : start + 13]


def test_the_projects_lists_are_exact():
    root = Path(pack_offline.__file__).parent
    for name in ("offline_gpu.txt", "offline_te.txt"):
        for line in lines(root / name):
            package, _, version = line.partition("==")
            assert package, line
            assert version[:1].isdigit(), line
    with pytest.raises(PackError, match=r"none\.txt"):
        lines(root / "none.txt")
