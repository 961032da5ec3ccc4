"""Conversion and inspection of checkpoints on one process: what is kept, what is refused, what is told."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from stare_megatron.__main__ import main
from stare_megatron.convert import inspection, run, tasks
from stare_megatron.convert.plan import ParallelLayout
from stare_megatron.convert.run import Options, convert
from stare_megatron.convert.source import Kind, check_tokenizer, resolve
from stare_megatron.convert.torch_dist import Box, TorchDist, cut
from stare_megatron.errors import UserError
from stare_megatron.host import manifest
from tests.unit.convert import hf_folders

QUIET = Console(quiet=True)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return hf_folders.make(tmp_path / "hf")


@pytest.fixture
def mcore(hf: Path, tmp_path: Path) -> Path:
    convert(Options(hf, tmp_path / "mcore"), QUIET)
    return tmp_path / "mcore"


def refused(options: Options) -> str:
    with pytest.raises(UserError) as e:
        convert(options, QUIET)
    said = str(e.value)
    assert "\n" not in said
    assert not options.out.exists(), "something appeared"
    return said


def inspection_finds_nothing(one: Path, other: Path) -> bool:
    pair = inspection.comparable(resolve(one), resolve(other), optimizer=False)
    return list(inspection.differences(*pair)) == []


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_everything_travels(hf: Path, mcore: Path, tmp_path: Path) -> None:
    convert(Options(mcore, tmp_path / "back"), QUIET)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((hf / "config.json").read_text())
    for folder in (mcore, tmp_path / "back"):
        assert manifest.verify(folder)
        assert sorted(manifest.read(folder) or {}) == manifest.files(folder)
        assert not [p for p in folder.rglob("*") if "partial" in p.name or p.name == tasks.RECORDS]
    assert not list(tmp_path.glob("*.partial"))


def test_several_files_and_processes(hf: Path, mcore: Path, tmp_path: Path) -> None:
    """The same weights whatever the files are; an index that names them."""
    outcome = convert(Options(mcore, tmp_path / "back", processes=2, file_bytes=40_000), QUIET)
    assert len(outcome.plan.files) > 4
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights(hf))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(hf).values())
    back = weights(tmp_path / "back")
    assert all(torch.equal(back[name], value) for name, value in weights(hf).items())
    convert(Options(tmp_path / "back", tmp_path / "again", file_bytes=40_000), QUIET)
    assert len(TorchDist(tmp_path / "again").files) > 4


def test_blocks_smaller_than_tensors(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tasks", "plan"):
        monkeypatch.setattr(f"stare_megatron.convert.{module}.BLOCK_BYTES", 1000)
    convert(Options(hf, tmp_path / "small"), QUIET)
    dist = TorchDist(tmp_path / "small")
    assert len(dist.pieces("embedding.word_embeddings.weight")) == 43, "128 rows, 3 of 256 bytes a block"
    convert(Options(tmp_path / "small", tmp_path / "back"), QUIET)
    assert all(torch.equal(weights(tmp_path / "back")[name], value) for name, value in weights(hf).items())


def test_tensors_are_cut_for_ranks(hf: Path, tmp_path: Path) -> None:
    convert(Options(hf, tmp_path / "tp2", layout=ParallelLayout(tensor_parallel=2)), QUIET)
    dist = TorchDist(tmp_path / "tp2")
    boxes = {key: [p.box for p in dist.pieces(key)] for key in dist.tensors}
    assert boxes["embedding.word_embeddings.weight"] == [Box((0, 0), (64, 64)), Box((64, 0), (64, 64))]
    assert boxes["decoder.layers.self_attention.linear_proj.weight"][:2] == [
        Box((0, 0, 0), (1, 64, 32)),
        Box((0, 0, 32), (1, 64, 32)),
    ]
    assert len(boxes["decoder.layers.mlp.linear_fc1.weight"]) == 2 * 2 * 2, "layers, gate and up, ranks"
    assert "4 (attention heads)" in refused(Options(hf, tmp_path / "x", layout=ParallelLayout(tensor_parallel=3)))
    assert "2 layers" in refused(Options(hf, tmp_path / "x", layout=ParallelLayout(pipeline_parallel=3)))


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_dtype(hf: Path, tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    convert(Options(hf, tmp_path / "m", dtype=dtype), QUIET)
    assert {info.dtype for info in TorchDist(tmp_path / "m").tensors.values()} == {kind}
    convert(Options(tmp_path / "m", tmp_path / "back"), QUIET)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == dtype
    for name, value in weights(tmp_path / "back").items():
        assert torch.equal(value, weights(hf)[name].to(kind)), name


def test_an_interrupted_conversion_is_gone_on_with(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third file fails; the second attempt writes that and what follows, and the result is that of one attempt."""
    real, calls = tasks.write_file, []

    def fail_at_third(job: Any, file: Any) -> Any:
        calls.append(file.name)
        if len(calls) == 3:
            raise OSError("No space left on device")
        return real(job, file)

    options = Options(hf, tmp_path / "m", file_bytes=40_000)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "write_file", fail_at_third)
        assert "cannot write the checkpoint: No space left" in refused(options)
    done = len(list((tmp_path / "m.partial" / tasks.RECORDS).glob("*.distcp.json")))
    outcome = convert(options, QUIET)
    assert outcome.reused == done >= 2
    convert(Options(hf, tmp_path / "whole", file_bytes=40_000), QUIET)
    # The index is a pickle, whose bytes depend on which of its strings are one object.
    sums = [{n: e for n, e in (manifest.read(tmp_path / f) or {}).items() if n != ".metadata"} for f in ("m", "whole")]
    assert sums[0] == sums[1]
    assert inspection_finds_nothing(tmp_path / "m", hf)


def test_what_was_begun_for_other_weights_is_not_used(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(hf, tmp_path / "m", file_bytes=40_000)
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_index", lambda *_: (_ for _ in ()).throw(OSError("interrupted")))
        refused(options)
    save_file({name: value + 1 for name, value in weights(hf).items()}, hf / "model.safetensors")
    assert convert(options, QUIET).reused == 0
    convert(Options(tmp_path / "m", tmp_path / "back"), QUIET)
    assert all(torch.equal(weights(tmp_path / "back")[name], value) for name, value in weights(hf).items())


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(data)


def test_damage_to_a_megatron_checkpoint(mcore: Path, tmp_path: Path) -> None:
    """Each in one line that names the file; found by the manifest, or without it by the format where that can tell."""
    out, name = tmp_path / "out", "__0_0.distcp"

    def damaged(change: Any, *, check: bool = True) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(mcore, copy)
        change(copy)
        return refused(Options(copy, out, check=check))

    size = (mcore / name).stat().st_size
    assert f"{name}: damaged: checksum" in damaged(lambda c: flip(c / name, size // 2))
    assert f"{name}: truncated" in damaged(lambda c: (c / name).write_bytes((c / name).read_bytes()[: size // 2]))
    assert f"{name}: missing" in damaged(lambda c: (c / name).unlink())
    assert ".metadata: damaged" in damaged(lambda c: flip(c / ".metadata", 700))
    assert f"{name}: truncated" in damaged(lambda c: (c / name).write_bytes(b"x"), check=False)
    assert f"{name}: missing" in damaged(lambda c: (c / name).unlink(), check=False)
    assert "metadata.json: damaged" in damaged(lambda c: (c / "metadata.json").write_text("{"), check=False)
    assert "no config.json" in damaged(lambda c: shutil.rmtree(c / "hf"), check=False)
    piece = TorchDist(mcore).pieces("decoder.final_layernorm.weight")[0]
    assert f"{name}: damaged" in damaged(lambda c: flip(c / name, piece.offset), check=False)


@pytest.mark.parametrize("position", range(20, 3000, 331))
def test_a_damaged_index_is_one_line_or_none_at_all(mcore: Path, tmp_path: Path, position: int) -> None:
    """Without the manifest: whatever a flipped bit makes of the index, it is refused or reads the same weights."""
    flip(mcore / ".metadata", min(position, (mcore / ".metadata").stat().st_size - 1))
    said = ""
    try:
        convert(Options(mcore, tmp_path / "out", check=False), QUIET)
    except UserError as e:
        said = str(e)
    assert "\n" not in said
    if not said:
        assert all(torch.equal(weights(tmp_path / "out")[n], v) for n, v in weights(tmp_path / "hf").items())


def test_an_index_that_would_run_code(mcore: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (mcore / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert "does not belong in an index" in refused(Options(mcore, tmp_path / "out", check=False))
    assert not (tmp_path / "ran").exists()


def test_damage_to_a_hugging_face_checkpoint(hf: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", hf / "model.safetensors"
    whole = file.read_bytes()
    manifest.write(hf)
    flip(file, len(whole) - 5)
    assert "model.safetensors: damaged: checksum" in refused(Options(hf, out))
    (hf / manifest.NAME).unlink()
    file.write_bytes(whole[:-100])
    assert "model.safetensors: cannot read the weights, truncated or damaged" in refused(Options(hf, out))
    file.unlink()
    assert "neither model.safetensors nor" in refused(Options(hf, out))
    file.write_bytes(whole)
    held = weights(hf)
    save_file({n: v for n, v in held.items() if n != "model.norm.weight"}, file)
    assert "'model.norm.weight' is missing" in refused(Options(hf, out))
    save_file(held | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, file)
    assert "'model.layers.0.self_attn.q_proj.bias' has no place" in refused(Options(hf, out))
    save_file(held | {"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, file)
    assert "'model.norm.weight' is stored as I8" in refused(Options(hf, out))


def test_a_missing_shard(hf: Path, mcore: Path, tmp_path: Path) -> None:
    convert(Options(mcore, tmp_path / "back", file_bytes=40_000), QUIET)
    gone = sorted((tmp_path / "back").glob("model-*.safetensors"))[2]
    gone.unlink()
    for check in (True, False):
        assert f"{gone.name}: missing" in refused(Options(tmp_path / "back", tmp_path / "out", check=check))


def test_a_checkpoint_of_another_model(mcore: Path, tmp_path: Path) -> None:
    wide = hf_folders.make(tmp_path / "wide", intermediate_size=128)
    deep = hf_folders.make(tmp_path / "deep", num_hidden_layers=3)
    bias = hf_folders.make(tmp_path / "bias", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    tied = hf_folders.make(tmp_path / "tied", tie_word_embeddings=True)
    out = tmp_path / "out"
    assert "linear_fc1.weight' has shape [2, 192, 64]" in refused(Options(mcore, out, hf=wide))
    assert "[3, " in refused(Options(mcore, out, hf=deep))
    assert "no tensor 'decoder.layers.self_attention.linear_qkv.bias'" in refused(Options(mcore, out, hf=bias))
    assert "'output_layer.weight' has no place" in refused(Options(mcore, out, hf=tied))
    save_file(weights(wide), tied / "model.safetensors")
    assert "has shape" in refused(Options(tied, out)) or "no place" in refused(Options(tied, out))


def test_a_tied_head_that_is_another(tmp_path: Path) -> None:
    tied = hf_folders.make(tmp_path / "tied", tie_word_embeddings=True)
    held = weights(tied)
    embedding = held["model.embed_tokens.weight"]
    save_file(held | {"lm_head.weight": embedding.clone()}, tied / "model.safetensors")
    convert(Options(tied, tmp_path / "m"), QUIET)
    save_file(held | {"lm_head.weight": embedding * 2}, tied / "model.safetensors")
    assert "lm_head.weight differs from the embedding" in refused(Options(tied, tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "eos", "fields", "says"),
    [
        (200, 2, {}, "vocabulary mismatch: the tokenizer has token id 199"),
        (90, 2, {"eos_token_id": 100}, "eos_token_id = 100 is no token of the tokenizer"),
        (90, 2, {"bos_token_id": 95}, "bos_token_id = 95 is no token of the tokenizer"),
        (110, 7, {}, "eos_token_id = 2 is an ordinary token of the tokenizer"),
        (40, 2, {}, "the tokenizer has 40 tokens, the embedding 113 rows"),
    ],
)
def test_a_wrong_tokenizer(hf: Path, tmp_path: Path, words: int, eos: int, fields: dict[str, int], says: str) -> None:
    hf_folders.tokenizer(hf, words, eos)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | fields))
    (hf / "generation_config.json").unlink()
    assert says in refused(Options(hf, tmp_path / "out"))


def test_a_tokenizer_is_not_required_and_may_be_smaller(hf: Path) -> None:
    assert check_tokenizer(hf) == "110 tokens"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hf / name).unlink()
    assert check_tokenizer(hf) == "none in the folder"


def test_what_a_path_names(hf: Path, mcore: Path, tmp_path: Path) -> None:
    assert resolve(hf).kind is Kind.HF
    assert resolve(mcore).hf == mcore / "hf"
    step = tmp_path / "run" / "checkpoints" / "step_000002"
    shutil.copytree(mcore, step / "trainer", ignore=shutil.ignore_patterns("hf"))
    (step / "loop.json").write_text("{}")
    (step.parent / "latest").write_text("step_000002\n")
    (tmp_path / "run" / "config.toml").write_text(f'[model]\npath = "{hf}"\n')
    for path in (tmp_path / "run", step, step / "trainer"):
        source = resolve(path)
        assert (source.kind, source.weights, source.hf) == (Kind.MCORE, step / "trainer", hf)
    (tmp_path / "run" / "config.toml").unlink()
    assert "--hf" in refused(Options(step, tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    for path, says in (
        (tmp_path / "empty", "not a checkpoint"),
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "run" / "checkpoints", "not a checkpoint"),
    ):
        assert says in refused(Options(path, tmp_path / "out"))


def test_targets_that_are_refused(hf: Path, mcore: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        convert(Options(hf, mcore), QUIET)
    assert "lies inside" in refused(Options(hf, hf / "out"))
    assert "is a Hugging Face checkpoint already" in refused(Options(hf, tmp_path / "out", to=Kind.HF))


def test_boxes_are_cut_to_cover_the_tensor_once() -> None:
    box = Box((3, 0, 10), (1, 7, 5))
    parts = list(cut(box, 2, 30))
    assert [p.sizes for p in parts] == [(1, 3, 5), (1, 3, 5), (1, 1, 5)]
    assert [p.offsets for p in parts] == [(3, 0, 10), (3, 3, 10), (3, 6, 10)]
    assert list(cut(box, 2, 1)) == [Box((3, i, 10), (1, 1, 5)) for i in range(7)], "a row is never split"
    assert box.meet(Box((3, 6, 0), (1, 9, 12))) == Box((3, 6, 10), (1, 1, 2))
    assert box.meet(Box((2, 0, 0), (1, 7, 99))) is None


def test_inspection_tells_and_compares(
    hf: Path, mcore: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def inspect(*arguments: str | Path) -> tuple[int, str]:
        return main(["inspect", *map(str, arguments)]), capsys.readouterr().out

    code, said = inspect(mcore, "--tensors")
    assert code == 0
    for part in ("Megatron-Core", "LlamaForCausalLM: 2 layers", "2x192x64", "decoder.layers.mlp.linear_fc1.weight"):
        assert part in said
    assert inspect(hf, mcore)[0] == 0, "the same model in both formats"
    sums = set(inspect(hf, "--checksums")[1].splitlines())
    held = weights(hf)
    held["model.norm.weight"][5] += 0.25
    changed = tmp_path / "changed"
    shutil.copytree(hf, changed)
    save_file(held, changed / "model.safetensors")
    code, said = inspect(mcore, changed)
    assert code == 1
    assert "model.norm.weight: values, largest difference 0.25" in said
    assert "1 of 21 tensors differ" in said
    other = set(inspect(changed, "--checksums")[1].splitlines())
    assert [line.split()[-1] for line in sums - other if "hf" not in line] == ["model.norm.weight"]
    code, said = inspect(hf, hf_folders.make(tmp_path / "three", num_hidden_layers=3))
    assert code == 1
    assert "model.layers.2.mlp.up_proj.weight: only in the second" in said
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2


def test_inspection_of_files(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(hf), "--write-manifest"]) == 0
    assert main(["inspect", str(hf), "--verify"]) == 0
    flip(hf / "model.safetensors", 5000)
    assert main(["inspect", str(hf), "--verify"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_differences_see_nan_infinity_and_dtype(hf: Path, tmp_path: Path) -> None:
    def tensors(name: str, change: Any) -> inspection.Tensors:
        shutil.copytree(hf, tmp_path / name)
        held = weights(hf)
        held["model.norm.weight"] = change(held["model.norm.weight"])
        save_file(held, tmp_path / name / "model.safetensors")
        return inspection.tensors(resolve(tmp_path / name), optimizer=False)

    def at_three(value: float) -> Any:
        return lambda t: t.index_fill(0, torch.tensor([3]), value)

    plain, nan, inf = (tensors(str(i), at_three(v)) for i, v in enumerate((1.0, float("nan"), float("inf"))))
    assert [d.largest for d in inspection.differences(plain, inf)] == [float("inf")]
    (found,) = inspection.differences(plain, nan)
    assert found.largest != found.largest, "NaN is not hidden"
    assert list(inspection.differences(nan, nan)) == []
    assert [d.what for d in inspection.differences(plain, tensors("half", lambda t: t.half()))] == [
        "dtype float32 and float16"
    ]
