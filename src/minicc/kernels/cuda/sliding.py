"""Windows that slide over channels-last memory, for CUDA: words, and the place of a thread's outputs.

A thread makes PIXELS neighbours along W of one channel; neighbouring threads take neighbouring channels, so that
every access of a warp is one piece of memory. Up to three spatial axes (D, H, W; unused ones have extent 1).
"""

from minicc.kernels.cuda.intrinsics import arg, divide, helper, ld

# Outputs of a thread, in `launch_windows` too.
PIXELS = 4

# The first words of the templates that use windows, as in kernels/cpu/windows.py.
X = 0
W = 1
IMAGES = 2
GROUPS = 3
M = 4  # output pixels of an image
N = 5  # output channels of a group
C = 6  # input channels of a group
X_IMAGE = 7
X_D = 8
X_H = 9
X_W = 10
ID = 11
IH = 12
IW = 13
OD = 14
OH = 15
OW = 16
KD = 17
KH = 18
KW = 19
SD = 20
SH = 21
SW = 22
DD = 23
DH = 24
DW = 25
PD = 26
PH = 27
PW = 28


@helper
def work(args):
    """Units of a call: channels times pieces of lines."""
    pieces = divide(arg(args, OW) + (PIXELS - 1), PIXELS)
    return arg(args, IMAGES) * arg(args, OD) * arg(args, OH) * pieces * arg(args, N)


@helper
def place(args, unit):
    """(image, plane, line, first column, channel) of the outputs of a unit."""
    pieces = divide(arg(args, OW) + (PIXELS - 1), PIXELS)
    rest = divide(unit, arg(args, N))
    channel = unit - rest * arg(args, N)
    lines = divide(rest, pieces)
    column = (rest - lines * pieces) * PIXELS
    planes = divide(lines, arg(args, OH))
    image = divide(planes, arg(args, OD))
    return image, planes - image * arg(args, OD), lines - planes * arg(args, OH), column, channel


@helper
def tap(x, at, position, extent, outside):
    """The element at an offset, or `outside` where its position is."""
    return ld(x, at) if (position >= 0) & (position < extent) else outside
