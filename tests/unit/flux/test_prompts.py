"""Prompt files: what is read, and what a faulty one is told."""

import pytest

from flux.prompts import load_prompts

FAULTS = {
    "empty": (lambda path: path.touch(), "has no prompts: write one per line"),
    "blank lines": (lambda path: path.write_text("\n  \n\t\n"), "has no prompts: write one per line"),
    "another encoding": (lambda path: path.write_bytes(b"caf\xe9\n"), "cannot be read as UTF-8 text ('utf-8' codec"),
    "missing": (lambda path: None, "cannot be read as UTF-8 text (No such file or directory)"),
    "a folder": (lambda path: path.mkdir(), "cannot be read as UTF-8 text (Is a directory)"),
}


def test_one_prompt_per_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa café\r\n\n  a red circle \n".encode())
    assert load_prompts(file, "key") == ["a café", "a red circle"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("key", ["validation.prompts_path", "inference.prompts_path", "--prompts-file"])
def test_faulty_files(tmp_path, fault, key):
    file, (make, said) = tmp_path / "prompts.txt", FAULTS[fault]
    make(file)
    with pytest.raises(ValueError) as caught:
        load_prompts(str(file), key)
    message = str(caught.value)
    assert message.startswith(f"{key}='{file}' ") and said in message and "one" in message.rpartition(": ")[2]
    assert "\n" not in message
