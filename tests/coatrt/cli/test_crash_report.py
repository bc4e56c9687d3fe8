"""Reports of unexpected errors: what they hold, what they leave out, where they go."""

from pathlib import Path

import pytest

from coatrt.cli.crash_report import write_report


def test_secrets_and_prompts_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path))
    arguments = [
        "run",
        "https://me:pass@host/x",
        "-p",
        "private",
        "--prompt=mine",
        "-pours",
        "--system",
        "be",
        "--top-k",
    ]
    path = write_report(ValueError("token=abc123&x hf_abcDEF"), [*arguments, "3"])
    assert path is not None and path.parent == tmp_path / "reports"
    assert path.stat().st_mode & 0o077 == 0
    text = path.read_text()
    for secret in ("pass", "private", "mine", "ours", " be ", "abc123", "hf_abc"):
        assert secret not in text
    assert "--top-k 3" in text and "ValueError: token=…&x …" in text


def test_without_a_cache_it_goes_to_the_temporary_directory_and_else_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    path = write_report(ValueError(), [])
    assert path is not None and path.parent == tmp_path / "tmp"
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    assert write_report(ValueError(), []) is None
