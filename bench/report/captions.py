"""Captions: machines, versions, days, titles of cases, and why a figure is missing."""

from __future__ import annotations

from bench.report.documents import MODELS, NOT_MEASURED, Case, Document


def machines(documents: list[Document]) -> list[str]:
    """The machines and versions of what README shows, each once, with the days it was measured."""
    days: dict[str, set[str]] = {}
    for document in documents:
        if any(c["model"] in MODELS for c in document["cases"]):
            facts, _, day = machine(document).rpartition(", ")
            days.setdefault(facts, set()).add(day)
    return [f"{facts}, {' and '.join(sorted(on))}" for facts, on in days.items()]


def machine(document: Document) -> str:
    """The machine, the versions and, last, the day."""
    e = document["environment"]
    runtime = e["onnxruntime"] or "not installed"
    networks = any(c["level"] == "network" for c in document["cases"])
    openvino = f"OpenVINO {e.get('openvino') or 'not installed'}, " if networks else ""
    gpu = f"{e['gpu']}, " if "gpu" in e else ""
    return gpu + (
        f"{e['cpu']} ({e['isa']} kernels), {e['threads']} of {e['cores']} cores, "
        f"casvit_kernels {e['casvit_kernels']}, torch {e['torch']}, ONNX Runtime {runtime}, "
        f"{openvino}{e['date'][:10]}"
    )


def gpu_machine(document: Document) -> str:
    e = document["environment"]
    return (
        f"{e['gpu']} (CUDA or HIP {e['cuda']}), backend {document['stamp']['backend']}, casvit_kernels "
        f"{e['casvit_kernels']}, sources {document['stamp']['version']}, torch {e['torch']}, "
        f"triton {e['triton']}, {e['date'][:10]}"
    )


def missing(cases: list[Case]) -> list[str]:
    """What was not measured or refused, and why; each reason once."""
    gaps = []
    for case in cases:
        if "refused" in case:
            gaps.append(f"Refused, {case_title(case)}: {case['refused']}.")
        if "error" in case:
            gaps.append(f"Refused, {case['id']}: {case['error']}.")
        for row in case.get("rows", ()):
            reason = row.get("absent") or row.get("error")
            if reason is not None:
                gaps.append(f"{row['candidate']} {NOT_MEASURED}: {reason}.")
    return list(dict.fromkeys(gaps))


def case_title(case: Case) -> str:
    stage = "whole model" if case["stage"] is None else f"stage {case['stage']}"
    shape = f"({case['batch']}, {case['channels']}, {case['size']}, {case.get('width') or case['size']})"
    return f"{case['model']} {stage}, {shape}"
