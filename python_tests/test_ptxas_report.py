"""What the comparison of registers and spills reads in a build's output, and what it reports."""

from ptxas_report import differences, parse

LOG = """\
[1/3] Building CXX object CMakeFiles/_core.dir/csrc/bindings.cpp.o
[2/3] Building CUDA object CMakeFiles/flame_cuda.dir/csrc/cuda/adam.cu.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function \
'_ZN5flame8isa_cuda10run_kernelINS0_14ElementsKernelINS0_10SoftUpdateEEEEEvT_' for 'sm_90'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 16 bytes smem
ptxas info    : Compiling entry function \
'_ZN5flame8isa_cuda10run_kernelINS0_10AdamKernelEEEvT_' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 37 registers, used 1 barriers
[3/3] Building CUDA object CMakeFiles/flame_cuda.dir/csrc/cuda/twin_q.cu.o
ptxas info    : Compiling entry function \
'_ZN5flame8isa_cuda10run_kernelINS0_11TwinQKernelILi8ELb1EEEEEvT_' for 'sm_120'
ptxas info    : Used 255 registers, used 1 barriers
"""


def test_a_build_is_read():
    rows = [tuple(row.values()) for row in parse(LOG)]
    assert rows == [
        ("adam.cu", "ElementsKernel<SoftUpdate>", "90", "24", "4", "12", "8", "16"),
        ("adam.cu", "AdamKernel", "80", "37", "0", "0", "0", "0"),
        ("twin_q.cu", "TwinQKernel<8>+tensor", "120", "255", "0", "0", "0", "0"),
    ]


def test_what_became_worse_is_reported():
    recorded = parse(LOG)
    assert differences(recorded, parse(LOG.replace("Used 37", "Used 53"))) == []
    now = parse(LOG.replace("Used 37", "Used 54").replace("4 bytes spill", "8 bytes spill"))
    assert differences(recorded, now) == [
        "adam.cu AdamKernel 80: registers 37 -> 54",
        "adam.cu ElementsKernel<SoftUpdate> 90: spill_stores 4 -> 8",
    ]
    assert differences(recorded[:2], parse(LOG)[1:]) == [
        "adam.cu ElementsKernel<SoftUpdate> 90: gone",
        "twin_q.cu TwinQKernel<8>+tensor 120: not in the table",
    ]
