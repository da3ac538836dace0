"""The machine's own limits: how fast all threads read memory, and how fast they multiply int8 matrices."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import psutil

from edge.bench.onnx_bytes import quantized_product
from profiles import performance_cores

Words = npt.NDArray[np.uint64]

MIN_STREAM_BYTES = 64 << 20
PIECE_WORDS = 1 << 20  # 8 MiB: a call's own cost does not count, its buffers stay small
PRODUCT = (256, 1536, 6144)  # rows, K, N: the up projection of an E2B layer; as fast as larger ones (measured)
PRODUCTS_A_SAMPLE = 4


class Roofline:
    """Measures both limits again and again; holds the buffer that is read."""

    def __init__(self, num_threads: int, stream_bytes: int) -> None:
        """`stream_bytes` shrinks to a quarter of the free memory; it must stay far above every cache."""
        self.num_threads = num_threads or performance_cores()
        size = max(MIN_STREAM_BYTES, min(stream_bytes, psutil.virtual_memory().available // 4))
        self._buffer = np.ones(size // 8, np.uint64)  # written: untouched pages would all be the one page of zeros
        rng = np.random.default_rng(0)
        num_rows, width, num_columns = PRODUCT
        weights = rng.integers(-127, 128, (width, num_columns), np.int8)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.num_threads
        options.log_severity_level = 4
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = quantized_product(num_rows, weights)
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._x = rng.standard_normal((num_rows, width), np.float32)
        self.multiply()  # the first run allocates

    @property
    def stream_bytes(self) -> int:
        """Size of the buffer."""
        return self._buffer.nbytes

    def stream(self) -> float:
        """Bytes per second that all threads read together."""
        return self.stream_bytes / stream_read(self._buffer, self.num_threads)

    def multiply(self) -> float:
        """Operations per second of an int8 product of prefill's size; a multiplication and an addition are two."""
        start = time.perf_counter()
        for _ in range(PRODUCTS_A_SAMPLE):
            self._session.run(None, {"x": self._x})
        return 2 * PRODUCTS_A_SAMPLE * float(np.prod(PRODUCT)) / (time.perf_counter() - start)


def stream_read(buffer: Words, num_threads: int) -> float:
    """Seconds in which `num_threads` threads read a buffer once, each its own part.

    A bitwise or of all words: of numpy's reductions the one that reached the most here (57 GB/s of 2 threads, against
    51 with a maximum and 46 with a float32 sum).
    """

    def read(part: Words) -> None:
        for first in range(0, len(part), PIECE_WORDS):
            np.bitwise_or.reduce(part[first : first + PIECE_WORDS])

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read, np.array_split(buffer[:PIECE_WORDS], num_threads)))  # starts the threads
        start = time.perf_counter()
        list(pool.map(read, np.array_split(buffer, num_threads)))
        return time.perf_counter() - start
