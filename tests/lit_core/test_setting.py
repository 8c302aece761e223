"""The fingerprint of a reproduction follows the data that flags name."""

import os
from pathlib import Path

import pytest

from lit_core.cli import Spec
from lit_core.setting import Setting

FOLDER = Path(__file__).parent  # without configurations


@pytest.mark.parametrize("written", ["--data.path=[{0},{1}]", '--data.path=["{0}", "{1}"]', "--data.path+={1}"])
def test_each_file_of_a_list_of_paths_is_followed(tmp_path: Path, written: str) -> None:
    file, folder = tmp_path / "a.jsonl", tmp_path / "b"
    folder.mkdir()
    for path in (file, folder / "corpus.jsonl"):
        path.write_text("{}")
    spec = Spec("name", "summary", FOLDER, "a:b", "c:d", "e:f")
    setting = Setting(spec, "tiny", (written.format(file, folder),))
    before = setting.fingerprint()
    assert setting.fingerprint() == before
    os.utime(folder / "corpus.jsonl", ns=(1, 1))
    later = setting.fingerprint()
    assert later != before
    if "+" not in written:
        file.write_text("{} ")
        assert setting.fingerprint() != later


def test_a_value_that_is_no_list_is_a_path_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[odd").write_text("{}")
    spec = Spec("name", "summary", FOLDER, "a:b", "c:d", "e:f")
    setting = Setting(spec, "tiny", ("--data.path=[odd",))
    before = setting.fingerprint()
    (tmp_path / "[odd").write_text("{} ")
    assert setting.fingerprint() != before
