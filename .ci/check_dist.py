"""Checks the wheel and the sdist of `make build`: their contents, and the installed wheel."""

import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = """
import importlib.metadata
import jax.numpy as jnp
import spherical_optax as so
assert "site-packages" in so.__file__, so.__file__
assert importlib.metadata.version("spherical_optax") == so.__version__
tx = so.adamsrt(1e-2, groups=so.per_layer())
params = jnp.ones(3)
tx.update(params, tx.init(params), params)
print("installed and used:", so.__version__)
"""


def compare(name: str, found: set[str], expected: set[str]) -> None:
    """Exits with a message if the files differ from the expected ones."""
    if found != expected:
        extra, missing = sorted(found - expected), sorted(expected - found)
        sys.exit(f"{name}: not expected: {extra}; missing: {missing}")
    print(f"{name}: {len(found)} files, as expected")


def tracked() -> set[str]:
    """The files in version control."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return set(listed.stdout.split("\0")) - {""}


def check_wheel(path: pathlib.Path, files: set[str]) -> None:
    """Checks that the wheel contains exactly the package, its license and metadata."""
    info = "-".join(path.name.split("-")[:2]) + ".dist-info"
    meta = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    package = {name for name in files if name.startswith("spherical_optax/")}
    assert {"spherical_optax/__init__.py", "spherical_optax/py.typed"} <= package
    with zipfile.ZipFile(path) as archive:
        compare(path.name, set(archive.namelist()), package | meta)


def check_sdist(path: pathlib.Path, files: set[str]) -> None:
    """Checks that the sdist contains exactly the files in version control and the metadata."""
    with tarfile.open(path) as archive:
        found = {m.name.partition("/")[2] for m in archive.getmembers() if not m.isdir()}
    compare(path.name, found, files | {"PKG-INFO"})


def check_installed(path: pathlib.Path) -> None:
    """Checks that the wheel works in an environment with only its dependencies."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = f"{folder}/bin/python"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, str(path)], check=True)
        subprocess.run([python, "-m", "pip", "check"], check=True)
        subprocess.run([python, "-I", "-c", PROGRAM], check=True, cwd=folder)


def main() -> None:
    """Checks the one wheel and the one sdist in dist/."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    files = tracked()
    check_wheel(wheel, files)
    check_sdist(sdist, files)
    check_installed(wheel)


if __name__ == "__main__":
    main()
