"""Writes the software bill of materials of wheels: CycloneDX 1.6, one JSON beside each.

    python release/sbom.py dist/*.whl       # dist/NAME.whl.cdx.json

A wheel holds this project's own code and, with CUDA kernels, the CUDA runtime, linked statically
(its version is the one in csrc/cuda/toolkit.txt). Everything else is what pip installs beside it: the
requirements, with the ranges that the wheel states. Validated against the schema before it is written.
Needs the extra `release`.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import re
import sys
import zipfile
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = "nvidia-cuda-runtime"


def of_wheel(path: Path) -> str:
    """The JSON text.

    Raises:
        ValueError: it does not keep to the schema.
    """
    with zipfile.ZipFile(path) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        about = email.message_from_bytes(archive.read(metadata))
        library = next((archive.read(n) for n in archive.namelist() if n.endswith("_C.so")), b"")
    name, version = about["Name"], about["Version"]
    bom = Bom()
    wheel = Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=path.name,
        licenses=[LicenseExpression(about["License-Expression"])],
        purl=PackageURL("pypi", name=name, version=version, qualifiers={"file_name": path.name}),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=_digest(path))],
    )
    bom.metadata.component = wheel
    parts = [_requirement(line) for line in about.get_all("Requires-Dist") or () if ";" not in line]
    if b"casvit_cuda_architectures" in library:
        parts.append(_cuda_runtime())
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(wheel, parts)
    written: str = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(
        indent=1
    )
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(written)
    if error is not None:
        raise ValueError(f"the bill of materials of {path.name} is not CycloneDX 1.6: {error}")
    return written


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _requirement(line: str) -> Component:
    """What pip installs beside the wheel: any version of a range."""
    found = re.match(r"([\w.-]+)\s*(.*)", line)
    assert found is not None, line
    return Component(
        name=found[1],
        type=ComponentType.LIBRARY,
        bom_ref=found[1],
        purl=PackageURL("pypi", name=found[1]),
        description=f"installed beside it, not in it: {found[2] or 'any version'}",
    )


def _cuda_runtime() -> Component:
    lines = (ROOT / "csrc" / "cuda" / "toolkit.txt").read_text(encoding="utf-8").splitlines()
    (version,) = (line.partition("==")[2] for line in lines if line.startswith(f"{RUNTIME}=="))
    return Component(
        name=RUNTIME,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"{RUNTIME}=={version}",
        licenses=[DisjunctiveLicense(name="NVIDIA CUDA Toolkit EULA")],
        purl=PackageURL("pypi", name=RUNTIME, version=version),
        description="linked statically into casvit_kernels/_C.so",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    for path in parser.parse_args(argv).wheels:
        if not path.is_file() or path.suffix != ".whl":
            parser.error(f"wheels: expected .whl files that are there, got {path}")
        target = path.with_name(f"{path.name}.cdx.json")
        target.write_text(of_wheel(path), encoding="utf-8")
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
