"""What XLA makes of a step for an H100: bytes, kernels and temporary memory, not times.

Needs the packages of the extra `accelerators`; `make test-accelerators` has them.
"""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
import compiled
import measure
import trees

PROGRAM = """
%fused (a.1: f32[8], b.1: f32[4]) -> f32[20] {
  %b.1 = f32[4]{0} parameter(1)
  %a.1 = f32[8]{0} parameter(0)
  %twice = f32[8]{0} add(%a.1, %a.1)
  ROOT %joined = f32[20]{0} concatenate(%twice, %a.1, %b.1), dimensions={0}
}

ENTRY %main (a: f32[8], b: f32[4]) -> f32[20] {
  %a = f32[8]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %start = (f32[4]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%a)
  %done = f32[4]{0:S(1)} copy-done(%start)
  %near = f32[4]{0:S(1)} negate(%done)
  ROOT %out = f32[20]{0} fusion(%a, %b), kind=kLoop, calls=%fused
}
"""


def test_bytes_of_a_program():
    """A part is joined twice, 4 entries are fetched from the main memory, and used elsewhere."""
    moved, kernels, copies = compiled.traffic(PROGRAM)
    assert moved == 4 * (2 * 8 + 4) + 4 * 20 + 4 * 4
    assert (kernels, copies) == (2, 0)


def test_a_target_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(compiled.TARGETS, "h100", ("jax_plugins.of_no_kind", None))
    message = "--target h100: expected the package jax_plugins.of_no_kind, found none; run `make "
    with pytest.raises(SystemExit, match=message):
        compiled.device_of("h100")


@pytest.fixture(scope="module")
def resnet18():
    try:
        device = compiled.device_of("h100")
    except SystemExit as missing:
        pytest.skip(str(missing))
    tree = trees.TREES["resnet18"]()

    def describe(name):
        tx = measure.OPTIMIZERS[name](tree.groups)
        return compiled.describe(tx, tree.shapes, "float32", device)

    return describe


@pytest.mark.parametrize(
    ("name", "most"), [("optax.adam", 28.1), ("adams", 25), ("adamsrt", 34), ("sgdmrt", 34)]
)
def test_bytes_of_a_step(resnet18, name, most):
    """Two passes over moment, gradient and parameter, and one that writes, are 32."""
    found = resnet18(name)
    assert found["bytes per parameter"] <= most
    assert found["kernels"] <= 2 * 62  # twice those of optax.adam
    assert found["temporary bytes per parameter"] <= 0.05 * 4
    assert found["copies"] == 0
