"""The published tables are what the published results say."""

import pytest

from benchmarks.tables import BEGIN, COLUMNS, END, FOLDER, insert, make_tables, read_results

STEP = {"seconds": 2.0, "samples_per_s": 16.0, "tflops": 0.3255, "matmul_percent": 50.0, "peak_gib": 3.25}
RESULT = {
    "hardware": "NVIDIA H200",
    "torch": "2.11",
    "layout": "8 ranks",
    "flavor": "flux-schnell",
    "samples": 32,
    "image_tokens": 256,
    "text_tokens": 128,
    "inputs": "encoded",
    "dtype": "bfloat16",
    "weights": "float32",
    "recompute": "none",
    "compile": True,
    "plan_gib": 3.0,
    "commit": "abc1234",
    "steps": {"update": STEP | {"mfu_percent": 40.0}},
    "ratios": {"update / naive": [0.6, 0.65, 0.7]},
}


def test_the_page_holds_what_the_results_say():
    page = (FOLDER / "README.md").read_text()
    assert page == insert(page, make_tables(read_results(FOLDER / "results"))), "run python -m benchmarks.tables"


def test_a_row():
    lines = make_tables([RESULT]).splitlines()
    assert lines[0] == "NVIDIA H200, torch 2.11:"
    cells = dict(zip(COLUMNS, [cell.strip() for cell in lines[-1].strip("|").split("|")], strict=True))
    assert cells["update x (image + text tokens)"] == "32 x (256 + 128)"
    assert cells["computes in"] == "bfloat16, weights float32"
    assert cells["of matmul, datasheet"] == "50.0 %, 40.0 %"
    assert cells["peak (plan), GiB"] == "3.2 (3.0)"
    assert cells["time of naive's"] == "0.650 (0.600 .. 0.700)"
    assert cells["transformer's time of diffusers'"] == ""


def test_machines_have_tables_of_their_own():
    text = make_tables([RESULT, RESULT | {"hardware": "CPU"}, RESULT])
    assert text.count("| samples/s |") == 2 and text.count("flux-schnell") == 3


def test_only_what_is_between_the_marks_changes():
    assert insert(f"a\n{BEGIN}old\n{END}\nb", "new\n") == f"a\n{BEGIN}new\n{END}\nb"
    with pytest.raises(ValueError, match="must hold"):
        insert("a page without marks", "new")
