"""Versions of what a run stands on, and whether the nodes agree."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter

from packaging.requirements import Requirement

import nlscale
from nlscale.cluster.doctor.findings import Finding, Grade, merged

Versions = dict[str, str]
"""Version by name; what is not there is left out."""

_CHECK = "versions"
_PACKAGES = ("torch", "megatron-core", "triton")
_MUST_AGREE = ("nlscale", "torch", "megatron-core", "NCCL")
"""What ranks talk to each other with, or compute the same numbers with."""


def probe(driver: str | None) -> Versions:
    """Versions here.

    Args:
        driver: of the GPUs, as nvidia-smi says it; None: there are none.
    """
    import torch

    from nlscale.ops.compiler import compiler_for  # imports torch

    found = {"nlscale": nlscale.__version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        compiler = compiler_for(torch.device("cuda"))
        if compiler is not None:
            found["ptxas"] = compiler.ptxas
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if driver:
        found["driver"] = driver
    return found


def probe_requirements() -> list[str]:
    """What nlscale requires and is not here, one text each: `torch is 2.9, >=2.11 is needed`."""
    try:
        declared = importlib.metadata.requires("nlscale") or []
    except importlib.metadata.PackageNotFoundError:
        return []  # run from its sources, which declare nothing
    unmet = []
    for text in declared:
        required = Requirement(text)
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(required.name)
        except importlib.metadata.PackageNotFoundError:
            unmet.append(f"{required.name} is missing, {required.specifier or 'any'} is needed")
            continue
        if not required.specifier.contains(version, prereleases=True):
            unmet.append(f"{required.name} is {version}, {required.specifier} is needed")
    return unmet


def judge(found: dict[str, Versions], unmet: dict[str, list[str]]) -> list[Finding]:
    """Whether every host has what is required and all have the same.

    Args:
        found: versions by host.
        unmet: what `probe_requirements` says, by host.
    """
    common = {
        name: _most_frequent([versions.get(name) for versions in found.values()])
        for name in dict.fromkeys(name for versions in found.values() for name in versions)
    }
    findings = []
    for host, versions in found.items():
        for name, usual in common.items():
            if versions.get(name) != usual:
                findings.append(_differs(host, name, versions.get(name), usual))
        if unmet[host]:
            advice = "install nlscale anew: `pip install --upgrade .` in its checkout"
            findings.append(Finding(_CHECK, Grade.error, "; ".join(unmet[host]), advice, (host,)))
    if not findings:
        # the same on all: which is which stands in the order of `probe`
        all_of = ", ".join(f"{name} {version}" for name, version in common.items())
        return [Finding(_CHECK, Grade.ok, all_of)]
    return merged(findings, found)


def _differs(host: str, name: str, version: str | None, usual: str | None) -> Finding:
    return Finding(
        _CHECK,
        Grade.error if name in _MUST_AGREE else Grade.warning,
        f"{name} {version or 'is missing'}, {usual or 'none'} on the other nodes",
        f"install the same {name} on all nodes",
        (host,),
    )


def _most_frequent(versions: list[str | None]) -> str | None:
    # of equally many the first: with two nodes, the second is said to differ from the first
    return Counter(versions).most_common(1)[0][0]
