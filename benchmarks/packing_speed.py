"""How fast documents are packed and how full the bins are: prints one table."""

import time

import numpy as np

from data.packing import pack

CAPACITY = 32_768
# documents in a call, calls of which the median is taken
CASES = ((512, 101), (10_000, 21), (1_000_000, 5), (14_000_000, 1))


def main() -> None:
    """Pack lengths drawn from lognormal(6.3, 0.9), clipped to 8..32,768 tokens, into 32k bins."""
    print(f"{'documents':>12} {'bins':>9} {'full':>9} {'ms a call':>11} {'documents/s':>13}")
    for documents, calls in CASES:
        drawn = np.random.default_rng(1).lognormal(6.3, 0.9, documents)
        lengths = np.clip(drawn, 8, CAPACITY).astype(np.int32)
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            bins = pack(lengths, CAPACITY)
            seconds.append(time.perf_counter() - start)
        median = float(np.median(seconds))
        full = lengths.sum(dtype=np.int64) / (len(bins) * CAPACITY)
        rate = documents / median
        print(f"{documents:>12,} {len(bins):>9,} {full:>9.3%} {median * 1e3:>11.2f} {rate:>13,.0f}")


if __name__ == "__main__":
    main()
