"""Drawing with a finished run."""

import json

import pytest
import torch
from PIL import Image

from scripts import sample, score_shapes

PROMPTS = ["a red circle on a blue background", "a small white star at the top on a black background"]


def draw(run, out, *arguments: str) -> list[Image.Image]:
    sample.main([f"--checkpoint={run.folder}", f"--out={out}", "--steps=2", *arguments])
    return [Image.open(path).convert("RGB") for path in sorted(out.iterdir())]


def test_a_picture_per_prompt(plain_run, tmp_path, capsys):
    images = draw(plain_run, tmp_path / "out", "--prompts", *PROMPTS, "--seed=7")
    assert [image.size for image in images] == [(32, 32)] * 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000-seed7.png", "001-seed8.png"]
    assert PROMPTS[1] in capsys.readouterr().out


def test_seeds_belong_to_pictures_not_to_batches(plain_run, tmp_path):
    together = draw(plain_run, tmp_path / "a", "--prompts", *PROMPTS, "--seed=7")
    one_by_one = draw(plain_run, tmp_path / "b", "--prompts", *PROMPTS, "--seed=7", "--batch-size=1")
    second_alone = draw(plain_run, tmp_path / "c", "--prompts", PROMPTS[1], "--seed=8")
    for one, other in zip([*together, together[1]], [*one_by_one, second_alone[0]], strict=True):
        difference = torch.tensor(list(one.tobytes()), dtype=torch.int16) - torch.tensor(list(other.tobytes()))
        assert difference.abs().max() <= 1  # rounding to bytes of fp32 results that differ in the last digits
    assert together[0].tobytes() != draw(plain_run, tmp_path / "d", "--prompts", PROMPTS[0], "--seed=8")[0].tobytes()


def test_size_and_prompt_file(plain_run, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, ""]))
    options = [f"--prompts-file={tmp_path / 'prompts.txt'}", "--height=48", "--width=80", "--cfg-scale=1"]
    assert [image.size for image in draw(plain_run, tmp_path / "out", *options)] == [(80, 48)] * 2


def test_scores_are_printed_and_written_to_the_metrics(plain_run, tmp_path, capsys):
    score_shapes.main([f"--checkpoint={plain_run.folder}", "--count=4", "--steps=2", f"--out={tmp_path / 'grid.png'}"])
    printed = capsys.readouterr().out
    last = json.loads((plain_run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and f"{last['shape_color_accuracy']:.1%}" in printed
    assert Image.open(tmp_path / "grid.png").size == (70, 70)


@pytest.mark.parametrize("count", [0, 10**6])
def test_counts_beyond_the_held_out_scenes(plain_run, count):
    with pytest.raises(ValueError, match="--count"):
        score_shapes.main([f"--checkpoint={plain_run.folder}", f"--count={count}"])
