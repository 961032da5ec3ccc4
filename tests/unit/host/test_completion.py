"""What bash completes, asked of bash."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from stare_megatron.__main__ import main
from stare_megatron.config import all_keys


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["completion", "bash"]) == 0
    file = tmp_path_factory.mktemp("completion") / "stare-megatron.bash"
    file.write_text(out.getvalue())
    return str(file)


def completed(script: str, *words: str) -> list[str]:
    """COMPREPLY for a line of `stare-megatron` and these words, the last being typed."""
    quoted = " ".join(f"'{word}'" for word in ("stare-megatron", *words))
    code = f'source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _stare_megatron; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["wat"], ["watch"]),
        (["co"], ["compare", "convert", "config", "completion"]),
        (["train", "run.toml", "--q"], ["--quiet"]),
        (["train", "run.toml", "trainer.world"], ["trainer.world_size="]),
        (["compare", "a", "--align", "t"], ["tokens", "time"]),
        (["launch", "sl"], ["slurm"]),
        (["config", "logging.prom"], ["logging.prometheus_port", "logging.prometheus_host"]),
        (["docs", "wat"], ["watching"]),
        (["completion", "z"], ["zsh"]),
        (["inspect", "--no-such"], []),
    ],
)
def test_commands_options_keys_and_pages(script, words, found):
    assert completed(script, *words) == found


def test_every_key_is_offered(script):
    assert set(completed(script, "train", "run.toml", "")) == {f"{key}=" for key in all_keys()}


def test_zsh_reads_the_same_through_its_own_bridge(capsys):
    main(["completion", "bash"])
    bash = capsys.readouterr().out
    main(["completion", "zsh"])
    zsh = capsys.readouterr().out
    assert zsh.endswith(bash)
    assert "bashcompinit" in zsh.removesuffix(bash)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_takes_it(tmp_path, capsys):
    main(["completion", "zsh"])
    (tmp_path / "file").write_text(capsys.readouterr().out)
    done = subprocess.run(["zsh", "-f", "-c", f"source {tmp_path}/file"], capture_output=True, text=True, timeout=300)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "run.toml"], "error: no command 'trian'; did you mean 'train'?\n"),
        (["xyzzy"], "invalid choice: 'xyzzy' (choose from "),
        (["train"], "error: the following arguments are required: config\n"),
    ],
)
def test_a_wrong_command_line_is_answered_with_what_was_meant(words, said, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert said in capsys.readouterr().err
