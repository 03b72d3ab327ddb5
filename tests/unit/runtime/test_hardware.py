"""Accelerators as data: a name finds the right one or none, and figures are in the units that they say."""

import pytest

from runtime.hardware import ACCELERATORS, find_accelerator


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("NVIDIA GB300", "gb300"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI355X VF", "mi355x"),
    ],
)
def test_a_device_is_found_by_torchs_name(device_name, name):
    assert find_accelerator(device_name) is ACCELERATORS[name]


@pytest.mark.parametrize(
    "device_name",
    ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 4090 Laptop GPU", "cpu", ""],
)
def test_a_slower_board_with_the_same_chip_is_another_device(device_name):
    assert find_accelerator(device_name) is None


def test_every_name_means_one_accelerator():
    names = [device_name for one in ACCELERATORS.values() for device_name in one.device_names]
    assert len(set(names)) == len(names)
    assert all(find_accelerator(name).name in ACCELERATORS for name in names)


@pytest.mark.parametrize("one", ACCELERATORS.values(), ids=lambda one: one.name)
def test_figures_are_dense_one_way_and_in_their_units(one):
    # Operations per byte that keep a chip busy. Peaks with sparsity, or GB for TB, leave this range on most of them.
    assert 150 < 1e3 * one.bf16_tflops / one.memory_gb_per_s < 450
    assert one.fp8_tflops is None or one.fp8_tflops == pytest.approx(2 * one.bf16_tflops, rel=0.02)
    assert one.network_gb_per_s < one.link_gb_per_s < one.memory_gb_per_s / 4
