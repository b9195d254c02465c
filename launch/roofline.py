"""Chips by their public data sheets, and the time that a program would take at their best.

A bound, no prediction: products are taken to run at the peak of bfloat16, arrays to move at the
full bandwidth of the memory, exchanges over all links of a chip at once.
"""

from typing import NamedTuple

from launch.hlo_cost import Cost

GIB = 2**30


class Chip(NamedTuple):
    """What a data sheet says of one device.

    Attributes:
      peak_flops: operations per second of products in bfloat16, accumulated in float32.
      hbm_bytes: memory that programs get.
      hbm_rate: bytes per second of that memory.
      link_rate: bytes per second that the chip sends, over all of its links.
    """

    peak_flops: float
    hbm_bytes: float
    hbm_rate: float
    link_rate: float


# Google Cloud documentation, "System architecture" of each version: peak compute per chip (bf16),
# HBM bandwidth per chip, inter-chip interconnect bandwidth per chip (half of what is given as
# bidirectional). The memory is what the compiler says programs get, somewhat less than the sheet's
# 16, 95 and 32 GB.
TPUS = {
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9),  # "TPU v5e": 400 GB/s both ways
    "v5p": Chip(459e12, 95.73 * GIB, 2765e9, 600e9),  # "TPU v5p": 4,800 Gbit/s
    "v6e": Chip(918e12, 31.24 * GIB, 1638e9, 400e9),  # "TPU v6e": 800 GB/s both ways
}

# NVIDIA's data sheets of the SXM parts: dense bfloat16, memory bandwidth, NVLink one way. A part of
# the name that the driver gives -> chip; the memory is asked of the device.
GPUS = {
    "H200": Chip(989e12, 0, 4800e9, 450e9),
    "H100": Chip(989e12, 0, 3350e9, 450e9),
    "A100": Chip(312e12, 0, 2039e9, 300e9),
}


class Estimate(NamedTuple):
    """Seconds of one run of a program on each device, at the data sheet's rates.

    Attributes:
      compute: of all products.
      memory: of all bytes of the main memory.
      exchange: of all bytes sent to others.
      kernels: kernel after kernel, each as long as the slower of its products and its bytes take,
        and at least `memory`, as copies beside them share the memory.
      at_best: all exchanges behind kernels.
      one_by_one: no exchange behind any.
    """

    compute: float
    memory: float
    exchange: float
    kernels: float
    at_best: float
    one_by_one: float


def estimate(cost: Cost, chip: Chip) -> Estimate:
    """The roofline of a program on a chip."""
    compute, memory = cost.flops / chip.peak_flops, cost.hbm_bytes / chip.hbm_rate
    exchange = cost.sent_bytes / chip.link_rate
    kernels = sum(
        max(one.flops / chip.peak_flops, one.hbm_bytes / chip.hbm_rate) * one.times
        for one in cost.kernels
        if not one.hidden
    )
    kernels = max(kernels, memory)
    return Estimate(compute, memory, exchange, kernels, max(kernels, exchange), kernels + exchange)
