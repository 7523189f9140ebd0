"""docs/troubleshooting.md has an entry for every message of the library, and no entry of another."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from messages import VARIES, Collector, Message, of_native, of_package

import casvit_kernels

PACKAGE = Path(casvit_kernels.__file__).parent
ROOT = PACKAGE.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
if not PAGE.is_file():
    pytest.skip("the documentation is not installed with the package", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")

# Where a message may be explained: by the longest beginning of the path of what raises it.
INSTALL = "Installation and the native library"
BACKENDS = "Backends"
ARGUMENTS = "Arguments of FusedCATM and catm"
FUSE = "fuse and unfuse"
NETWORK = "fuse_network"
TRAINING = "Training"
GPUS = "GPUs: precompile and plan"
MODELS = "Models and checkpoints"
HEADS = "Detectors and segmenters"
TOKENS = "Token clustering"
FOLDING = "Folding"
EXPORT = "Exporting, ONNX and Core ML alike"
ONNX = "Exporting ONNX"
COREML = "Exporting Core ML"
CLI = "Command line"
BENCHMARKS = "Benchmarks and parity"
WARNINGS = "Warnings"
NATIVE = "Messages of the native library"
SECTIONS = {
    "setup.py": (INSTALL,),
    "_optional.py": (INSTALL,),
    "backends/native.py": (INSTALL,),
    "csrc/cpu/dispatch.cpp": (INSTALL,),
    "backends/": (BACKENDS,),
    "ops/mixer/cuda.py": (BACKENDS,),
    "ops/mixer/kernels.py": (BACKENDS,),
    "module.py": (ARGUMENTS, FUSE, TRAINING),
    "functional.py": (ARGUMENTS,),
    "ops/mixer/": (ARGUMENTS, TRAINING),
    "ops/mixer/structure.py": (FUSE,),
    "ops/mixer/trial.py": (FUSE,),
    "surgery/fuse.py": (FUSE, BACKENDS),
    "surgery/": (NETWORK, FUSE),
    "surgery/fold.py": (FOLDING,),
    "ops/network/": (NETWORK,),
    "ops/mixer/triton/": (GPUS,),
    "ops/mixer/plans.py": (GPUS,),
    "models/": (MODELS,),
    "models/heads/": (HEADS,),
    "tokens/": (TOKENS,),
    "export/": (EXPORT,),
    "export/onnx/": (ONNX, EXPORT),
    "export/coreml/": (COREML, EXPORT),
    "_files.py": (EXPORT, CLI),
    "photographs.py": (CLI,),
    "cli/": (CLI,),
    "demo/": (CLI,),
    "doctor/": (CLI,),
    "benchmark/": (BENCHMARKS,),
    "testing/": (BENCHMARKS,),
    "csrc/": (NATIVE,),
}
# Raises that hand on the words of another one, or are caught in the same file.
HANDED_ON = {
    ("_files.py", "_lock"): "an error number of the system",
    ("_files.py", "_renamed"): "an error number of the system",
    ("_files.py", "_move"): "caught by staged",
    ("backends/registry.py", "_say_once"): "a backend's reason",
    ("benchmark/candidates.py", "network_of"): "a BackendUnavailable",
    ("cli/arguments.py", "refusing"): "the error of the library",
    ("cli/plan.py", "run"): "the error of the library",
    ("setup.py", "build_extension"): "a NotBuilt",
    ("surgery/fold.py", "_neighbours"): "the reasons of each way",
    ("surgery/stand_in.py", "__getattr__"): "the name of an attribute, as Python says it",
}
# Functions that return text or None, and the text is no reason.
NO_REASONS = {
    ("backends/cuda.py", "build"): "what the kernels were built with",
    ("models/keys.py", "unusable"): "stands behind 'expected a dense tensor with storage, got'",
    ("ops/network/packed.py", "_obstacle"): "never shown",
}
# Texts that native functions put into messages.
PARTS = {
    f"scalar type {VARIES}",
    f"{VARIES} tensor of {VARIES} dimensions and {VARIES} elements on {VARIES}",
    "unknown compiler",
}
LEAST_WORDS = 3  # of a pattern that stands for more than one message
NONSENSE = (
    "frobnicate: expected a widget, got a gadget",
    "frobnicate: expected at most two, found three",
    "blocks[3]: the widget is broken: turn it off and on",
    "the widget cannot be turned",
    "file.pth: this is no widget",
    "CUDA kernels: the widget is broken",
)


class Entry(NamedTuple):
    section: str
    patterns: list[str]
    prose: str


def entries_of(text):
    """Bullets that begin with messages: lines of nothing but code that end with a backslash."""
    found, section = [], ""
    entry = None
    for line in text.splitlines():
        title = re.match(r"#+ (.*)", line)
        message = re.fullmatch(r"(- |  )(`+)(.+?)\2\\", line)
        if title:
            section, entry = title[1], None
        elif message and message[1] == "- ":
            entry = Entry(section, [message[3].strip()], "")
            found.append(entry)
        elif message:
            assert entry is not None, f"a message in no entry: {line}"
            assert not entry.prose, f"a message in the middle of an entry: {line}"
            entry.patterns.append(message[3].strip())
        elif entry is not None and line.startswith("  "):
            found[-1] = entry = entry._replace(prose=f"{entry.prose} {line.strip()}".strip())
        else:
            entry = None
    return found


def expression(pattern):
    return re.compile(".*".join(map(re.escape, pattern.split(VARIES))), re.DOTALL)


def sections_for(message):
    if message.kind == "warn":
        return (WARNINGS,)
    return SECTIONS[section_key(message.path)]


def unexplained(said, entries):
    patterns = {}
    for entry in entries:
        patterns.setdefault(entry.section, []).extend(map(expression, entry.patterns))
    return [
        message
        for message in said
        if not any(p.fullmatch(message.text) for s in sections_for(message) for p in patterns[s])
    ]


ENTRIES = entries_of(TEXT)
SOURCES = ROOT / "csrc"


@functools.cache
def python():
    return of_package(PACKAGE, ROOT)


@functools.cache
def messages():
    found = [m for m in python()[0] if (m.path, m.where) not in NO_REASONS]
    native = of_native(SOURCES) if SOURCES.is_dir() else []
    return [*found, *(m for m in native if m.text not in PARTS)]


def section_key(path):
    return max((p for p in SECTIONS if path.startswith(p)), key=len)


def shown(said):
    return "\n".join(f"{m.path}:{m.line} {m.where}: {m.text}" for m in said)


@pytest.mark.parametrize("path", sorted(SECTIONS))
def test_every_message_has_an_entry(path):
    mine = [m for m in messages() if section_key(m.path) == path]
    assert mine or not SOURCES.is_dir() or path == "setup.py", (
        "nothing here: leave it out of SECTIONS"
    )
    missing = unexplained(mine, ENTRIES)
    assert not missing, f"no entry in one of {SECTIONS[path]} for\n{shown(missing)}"


def test_every_file_with_messages_has_a_section():
    for path in {m.path for m in messages()}:
        assert any(path.startswith(p) for p in SECTIONS), path
    titles = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert set(titles) >= {s for sections in SECTIONS.values() for s in sections}


@pytest.mark.skipif(not SOURCES.is_dir(), reason="the sources are not installed with the package")
def test_every_entry_is_a_message():
    gone = []
    for entry in ENTRIES:
        texts = [m.text for m in messages() if entry.section in sections_for(m)]
        gone += [p for p in entry.patterns if not any(map(expression(p).fullmatch, texts))]
    assert not gone, (
        "no message of the library reads so, where the section is about:\n" + "\n".join(gone)
    )


def test_patterns_are_not_wide():
    texts = {m.text for m in messages()}
    for entry in ENTRIES:
        for pattern in entry.patterns:
            wide = expression(pattern)
            assert not any(map(wide.fullmatch, NONSENSE)), pattern
            if any(text != pattern and wide.fullmatch(text) for text in texts):
                named = re.match(rf"[^{VARIES}:]+: expected ", pattern)
                words = re.findall(r"[A-Za-z]+", pattern)
                assert named or len(words) >= LEAST_WORDS, f"stands for too much: {pattern}"


def test_every_raise_says_something():
    silent = {(path, where) for path, where, _ in python()[1]}
    assert silent == set(HANDED_ON) - ({("setup.py", "build_extension")} - silent)
    known = {(m.path, m.where) for m in python()[0]}
    assert known >= set(NO_REASONS), "one of these is no more"


def test_entries_say_what_to_do():
    assert len(ENTRIES) > 150
    for entry in ENTRIES:
        assert "**Do:**" in entry.prose, entry.patterns
        assert len(set(entry.patterns)) == len(entry.patterns), entry.patterns
    for section in {entry.section for entry in ENTRIES}:
        every = [p for entry in ENTRIES if entry.section == section for p in entry.patterns]
        assert len(set(every)) == len(every), f"twice in {section!r}"


def test_the_collector_follows_helpers():
    sources = {
        "tokens/a.py": (
            "from .b import expect\n"
            "_HINT = 'turn it'\n"
            "def check(size, grid):\n"
            "    for name, value in (('size', size), ('grid', grid)):\n"
            "        _whole(name, value)\n"
            "    expect(size, f'the {size} is odd')\n"
            "def _whole(name, value, most=3):\n"
            "    hint = f' ({_HINT})' if most else ''\n"
            "    raise ValueError(f'{name}: expected a whole number, got {value!r}{hint}')\n"
            "def _why_not(x) -> str | None:\n"
            "    return None if x else f'it is {x}, ' + _HINT\n"
        ),
        "tokens/b.py": (
            "import warnings\n"
            "def expect(condition, reason):\n"
            "    if not condition:\n"
            "        raise RuntimeError(reason)\n"
            "def say(x):\n"
            "    warnings.warn(f'{x} is loud', stacklevel=2)\n"
            "    raise OSError(x)\n"
        ),
    }
    found, wordless = Collector(sources).messages()
    assert {(m.kind, m.text) for m in found} == {
        ("raise", f"size: expected a whole number, got {VARIES} (turn it)"),
        ("raise", f"size: expected a whole number, got {VARIES}"),
        ("raise", f"grid: expected a whole number, got {VARIES} (turn it)"),
        ("raise", f"grid: expected a whole number, got {VARIES}"),
        ("raise", f"the {VARIES} is odd"),
        ("warn", f"{VARIES} is loud"),
        ("reason", f"it is {VARIES}, turn it"),
    }
    assert wordless == [("tokens/b.py", "say", 7)]


def test_a_message_without_an_entry_is_noticed():
    new = Message("x: expected a widget, got …", "raise", "export/onnx/export.py", "to_onnx", 1)
    assert unexplained([new], ENTRIES) == [new]
    family = new._replace(text="normalize: expected a widget, got …")
    assert unexplained([family], ENTRIES) == []
    for other in (family._replace(kind="warn"), family._replace(path="models/rcvit.py")):
        assert unexplained([other], ENTRIES) == [other]


@pytest.mark.skipif(not SOURCES.is_dir(), reason="the sources are not installed with the package")
def test_native_messages_are_read(tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "a.cpp").write_text(
        'STD_TORCH_CHECK(a(b, c) == 2, name, ": expected a pair (B, C), "\n  "got ", x.dim());\n'
        'throw std::invalid_argument("plan: ends before " + std::string(name));\n'
        'return ok ? "" : "there is no such thing";  // "not this one here"\n'
        'return std::string("this CPU has no ") + feature;\n'
    )
    (tmp_path / "cuda" / "b.h").write_text('if (bad) return "maps this wide "\n  "do not fit";\n')
    assert {m.text for m in of_native(tmp_path)} == {
        f"{VARIES}: expected a pair (B, C), got {VARIES}",
        f"plan: ends before {VARIES}",
        "there is no such thing",
        f"this CPU has no {VARIES}",
        "CUDA kernels: maps this wide do not fit",
    }
    assert len(of_native(SOURCES)) > 50


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, anchor = target.partition("#")
        page = PAGE.parent / path if path else PAGE
        assert page.is_file(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target
