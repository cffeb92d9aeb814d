"""The command's outside: version, help, unknown commands, and `doctor`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lora_kernels.cli import COMMANDS, main, version
from lora_kernels.dispatch import ops, use_backend


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"lora-kernels {version()}"


def test_no_command_shows_every_command(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(name in out and text in out for name, (_, text) in COMMANDS.items())


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fintune"])
    assert stop.value.code == 2 and "fintune" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"lora-kernels {command}" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from lora_kernels.cli import main\n"
        "try: main(['finetune', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('transformers' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_doctor_has_a_path_for_every_op(capsys):
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for title in ("machine", "versions", "native extension", "paths"):
        assert title in captured.out
    for name in ops():
        rows = [line.split() for line in captured.out.splitlines() if line.startswith(f"  {name} ")]
        assert rows, name
        for row in rows:
            assert {"native", "triton", "reference"} & set(row), row
            assert "no example here" not in " ".join(row)


def test_doctor_says_why_a_backend_is_not_taken(capsys):
    with use_backend("reference"):
        main(["doctor"])
    out = capsys.readouterr().out
    table, _, reasons = out.partition("not taken, and why")
    assert " native" not in table.partition("paths,")[2]
    assert reasons.strip()


def test_doctor_without_the_extension():
    import os

    run = subprocess.run(
        [sys.executable, "-c", "import sys; from lora_kernels.cli import main; main(['doctor'])"],
        # Interpreting Triton's kernels would take two minutes.
        env={**os.environ, "LORA_KERNELS_NO_NATIVE": "1", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "not loaded: LORA_KERNELS_NO_NATIVE is set" in run.stdout
    assert "LORA_KERNELS_NO_NATIVE is set" in run.stdout.partition("not taken")[2]
