"""CPU targets: names, keys, cache sizes and thread limits as the system reports them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from minicc.errors import TargetError
from minicc.targets import cpu
from minicc.targets.cpu import available_threads, host_target, parse_target


@pytest.mark.parametrize(
    ("name", "width", "registers"),
    [("cpu:sse", 4, 16), ("cpu:avx2", 8, 16), ("cpu:avx512", 16, 32), ("cpu:neon", 4, 32)],
)
def test_fixed_targets(name: str, width: int, registers: int) -> None:
    target = parse_target(f" {name.upper()} ")
    assert (target.name, target.vector_width, target.vector_registers) == (name, width, registers)


@pytest.mark.parametrize("name", ["", "gpu", "cpu:", "cpu:mmx", "cuda", "cpu:avx2:x"])
def test_unknown_targets(name: str) -> None:
    if name == "cpu:":
        assert parse_target(name) == host_target()
        return
    with pytest.raises(TargetError, match="cpu:avx2"):
        parse_target(name)


def test_host() -> None:
    host = host_target()
    assert parse_target("cpu") == host
    assert host.missing_features() == ()
    assert host.vector_width in (4, 8, 16)
    assert 8 << 10 <= host.l1_bytes <= host.l2_bytes


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux describes processors there")
def test_linux_lists_no_feature_that_llvm_does_not_find() -> None:
    """On x86; what Linux does not list is asked of LLVM."""
    listed, found = cpu._listed_features(), cpu._host_features()
    names = {feature: cpu._plain(cpu._LINUX_NAMES.get(feature, feature)) for feature in found}
    assert not [feature for feature, name in names.items() if name in listed and not found[feature]]
    assert cpu.host_identity() == cpu.host_identity() != ""


def test_foreign_target_cannot_run_here() -> None:
    foreign = "cpu:neon" if host_target().triple.startswith("x86") else "cpu:avx2"
    assert parse_target(foreign).missing_features()
    assert replace(host_target(), features="+imaginary").missing_features() == ("imaginary",)


def test_fingerprint_covers_what_decides_about_code() -> None:
    base = parse_target("cpu:avx2")
    assert base.fingerprint() == replace(base, name="other", l1_bytes=1).fingerprint()
    changes = [{"cpu": "x"}, {"triple": "x"}, {"features": "x"}, {"vector_width": 1}, {"vector_registers": 1}]
    keys = {base.fingerprint()} | {replace(base, **change).fingerprint() for change in changes}
    assert len(keys) == 6


def files(monkeypatch: pytest.MonkeyPatch, contents: dict[str, str]) -> None:
    monkeypatch.setattr(cpu, "_read", lambda path: contents.get(str(path), ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def test_threads_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch, {})
    assert available_threads() == 16


@pytest.mark.parametrize(
    ("quota", "threads"), [("max 100000", 16), ("350000 100000", 3), ("50000 100000", 1), ("bad", 16)]
)
def test_threads_of_cgroup_v2(monkeypatch: pytest.MonkeyPatch, quota: str, threads: int) -> None:
    files(monkeypatch, {"/proc/self/cgroup": "0::/a/b", "/sys/fs/cgroup/a/cpu.max": quota})
    assert available_threads() == threads


@pytest.mark.parametrize(("quota", "threads"), [("-1", 16), ("200000", 2)])
def test_threads_of_cgroup_v1(monkeypatch: pytest.MonkeyPatch, quota: str, threads: int) -> None:
    folder = Path("/sys/fs/cgroup/cpu,cpuacct/a")
    group = {"/proc/self/cgroup": "3:memory:/m\n2:cpu,cpuacct:/a\n"}
    files(monkeypatch, group | {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"})
    assert available_threads() == threads


def test_cache_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    root = "/sys/devices/system/cpu/cpu0/cache"
    files(
        monkeypatch,
        {
            **{f"{root}/index0/level": "1", f"{root}/index0/type": "Data", f"{root}/index0/size": "48K"},
            **{
                f"{root}/index1/level": "1",
                f"{root}/index1/type": "Instruction",
                f"{root}/index1/size": "64K",
            },
            **{f"{root}/index2/level": "2", f"{root}/index2/type": "Unified", f"{root}/index2/size": "2M"},
        },
    )
    assert cpu._cache_bytes() == (48 << 10, 2 << 20)
