"""Reading cubins: against what ptxas itself says, and against PTX with known instructions."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from minicc.codegen.cuda import find_tool
from minicc.errors import TargetError
from tools.gpu_check.facts import cubins_of, facts_of, facts_table, family_of

PTX = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 a, .param .u64 b) {{
  .reg .b64 %p<3>; .reg .f32 %f<5>;
  .shared .align 16 .b8 tile[512];
  ld.param.u64 %p1, [a]; ld.param.u64 %p2, [b];
  cvta.to.global.u64 %p1, %p1; cvta.to.global.u64 %p2, %p2;
  {body}
  ret;
}}
"""
WIDE = "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%p1]; st.global.v4.f32 [%p2], {%f1, %f2, %f3, %f4};"
FUSED = """ld.global.f32 %f1, [%p1]; fma.rn.f32 %f2, %f1, %f1, %f1;
  st.shared.f32 [tile], %f2; bar.sync 0; st.global.f32 [%p2], %f2;"""


@pytest.fixture(scope="module")
def ptxas() -> str:
    found = find_tool("ptxas")
    if found is None or find_tool("cuobjdump") is None:
        pytest.skip("ptxas or cuobjdump is not installed")
    return found


def assemble(ptxas: str, folder: Path, body: str) -> tuple[bytes, str]:
    """The cubin, and what ptxas says of it."""
    (folder / "k.ptx").write_text(PTX.format(body=body))
    command = [ptxas, "-arch=sm_90", "-v", str(folder / "k.ptx"), "-o", str(folder / "k.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return (folder / "k.cubin").read_bytes(), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("body", "expected"),
    [(WIDE, {"LDG.128": 1, "STG.128": 1}), (FUSED, {"LDG": 1, "STG": 1, "FFMA": 1, "STS": 1, "BAR": 1})],
)
def test_facts_agree_with_ptxas(ptxas: str, tmp_path: Path, body: str, expected: dict[str, int]) -> None:
    cubin, said = assemble(ptxas, tmp_path, body)
    facts = facts_of(cubin)
    found = re.search(r"Used (\d+) registers", said)
    assert found is not None and facts.registers == int(found[1])
    shared = re.search(r"(\d+) bytes smem", said)
    used = int(shared[1]) if shared else 0
    assert facts.shared in (used, used + 1024 if used else 0)  # cuobjdump counts what the system reserves, ptxas does not
    mix = facts.mix()
    assert {name: times for name, times in mix.items() if name != "other"} == expected


def test_the_table_groups_kernels_of_saved_modules_by_family(ptxas: str, tmp_path: Path) -> None:
    wide, fused = (assemble(ptxas, tmp_path, body)[0] for body in (WIDE, FUSED))
    for number, members in enumerate(({"copy_0123456789ab": wide, "gemm_aaaaaaaaaaaa": fused}, {"copy_ffffffffffff": wide})):
        with zipfile.ZipFile(tmp_path / f"{number}.minicc", "w") as file:
            for symbol, cubin in members.items():
                file.writestr(f"objects/{symbol}.cubin", cubin)
    table = facts_table(cubins_of(sorted(tmp_path.glob("*.minicc")))).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:3]] for line in table[2:]] == [["copy", "2"], ["gemm", "1"]]
    assert len({line.count("|") for line in table}) == 1


def test_families_are_symbols_without_their_hash() -> None:
    assert family_of("conv_relu_0123456789abcdef") == "conv_relu"
    assert family_of("decade") == "decade"


def test_what_is_no_cubin_is_a_target_error(ptxas: str) -> None:
    with pytest.raises(TargetError):
        facts_of(b"no cubin")
