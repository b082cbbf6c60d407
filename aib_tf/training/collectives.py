"""What the workers of a strategy tell one another outside of the training step: arrays, texts, and where each stands.

Every function is called by all workers, in the same order, outside of `tf.function` and of `strategy.run`. With one
worker they return what they were given. All of them rest on one operation, the sum over the workers of int64 tensors to
which one worker adds its bytes and the others add zeros: it is exact whatever the bytes mean, and unlike a file it asks
for nothing that the machines share.
"""

import json

import numpy as np
import tensorflow as tf

# Bounds what a worker holds beside the arrays themselves.
_CHUNK_BYTES = 32 * 2**20
_WORD = 8  # bytes of an int64; TensorFlow refuses to sum int32 on a GPU


def worker_index(strategy):
    """Returns the number of this worker, from 0; the chief is 0."""
    return _position(strategy)[0]


def worker_count(strategy):
    """Returns the number of workers, each a process; 1 for every strategy but `MultiWorkerMirroredStrategy`."""
    return _position(strategy)[1]


def broadcast(strategy, arrays):
    """Sends arrays from the chief to all workers, bit for bit.

    Args:
        strategy: a `tf.distribute.Strategy`.
        arrays: on the chief, a list of NumPy arrays of any shape and of any dtype without Python objects, bfloat16 too.
            On the other workers it is not looked at and may be None.

    Returns:
        The chief's list. On the chief it holds the arrays themselves, on the other workers new ones.

    Raises:
        ValueError: on the chief, if `arrays` is None or has an array of Python objects; then the other workers wait.
        tf.errors.UnavailableError: if a worker was lost. Other errors of `tf.errors` are possible.
    """
    index, count = _position(strategy)
    if index == 0:
        if arrays is None:
            raise ValueError("The chief has to name the arrays to send. Received: arrays=None")
        arrays = [np.asarray(array) for array in arrays]
        objects = [number for number, array in enumerate(arrays) if array.dtype.hasobject]
        if objects:
            raise ValueError(f"Arrays of Python objects cannot be sent. Received: arrays[{objects[0]}].dtype=object")
    if count == 1:
        return arrays
    if index == 0:
        header = json.dumps([[_dtype_name(array.dtype), list(array.shape)] for array in arrays]).encode()
        _broadcast_bytes(strategy, np.frombuffer(header, "uint8"))
        for batch in _batches([array.nbytes for array in arrays]):
            # One collective for many small arrays.
            parts = [np.ascontiguousarray(arrays[number]).reshape(-1).view("uint8") for number in batch]
            _broadcast_bytes(strategy, np.concatenate(parts), sum(part.size for part in parts))
        return arrays
    header = json.loads(_broadcast_bytes(strategy, None).tobytes())
    kinds = [(_dtype(name), tuple(shape)) for name, shape in header]
    sizes = [dtype.itemsize * int(np.prod(shape, dtype="int64")) for dtype, shape in kinds]
    received = []
    for batch in _batches(sizes):
        data = _broadcast_bytes(strategy, None, sum(sizes[number] for number in batch))
        ends = np.cumsum([sizes[number] for number in batch])
        for number, end in zip(batch, ends, strict=True):
            dtype, shape = kinds[number]
            received.append(data[end - sizes[number] : end].view(dtype).reshape(shape).copy())
    return received


def gather_texts(strategy, text):
    """Collects a text from each worker on all of them.

    Args:
        strategy: a `tf.distribute.Strategy`.
        text: this worker's text, of any length.

    Returns:
        A list with the text of each worker, in the order of their indices.

    Raises:
        tf.errors.UnavailableError: if a worker was lost. Other errors of `tf.errors` are possible.
    """
    index, count = _position(strategy)
    if count == 1:
        return [text]
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), "uint8")
    sizes = np.zeros(count, "int64")
    sizes[index] = data.size
    sizes = _sum(strategy, sizes)
    rows = np.zeros([count, _words(int(sizes.max()))], "int64")
    rows[index] = _to_words(data, rows.shape[1])
    rows = _sum(strategy, rows.reshape(-1)).reshape(rows.shape)
    return [row.tobytes()[:size].decode("utf-8", "surrogatepass") for row, size in zip(rows, sizes, strict=True)]


def _position(strategy):
    """The index of this worker and the number of workers, with a chief of a job of its own counted first."""
    # A strategy for one process has no resolver, or one without a cluster.
    resolver = getattr(strategy, "cluster_resolver", None)
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) or resolver is None:
        return 0, 1
    tasks = {job: len(addresses) for job, addresses in resolver.cluster_spec().as_dict().items()}
    chiefs = tasks.get("chief", 0)
    count = chiefs + tasks.get("worker", 0)
    if count < 2:
        return 0, 1
    return (chiefs if resolver.task_type == "worker" else 0) + resolver.task_id, count


def _broadcast_bytes(strategy, data, size=None):
    """Sends bytes from the chief; without a `size` known to all, that first."""
    if size is None:
        size = int(_sum(strategy, np.array([0 if data is None else data.size], "int64"))[0])
    result = np.empty(_words(size), "int64")
    step = _CHUNK_BYTES // _WORD
    source = None if data is None else _to_words(data, result.size)
    for start in range(0, result.size, step):
        end = min(start + step, result.size)
        result[start:end] = _sum(strategy, np.zeros(end - start, "int64") if source is None else source[start:end])
    return result.view("uint8")[:size]


def _sum(strategy, values):
    """The sum over the workers of a vector of int64."""
    if not values.size:
        return values  # TensorFlow's ring of empty tensors ends in a segmentation fault.
    return strategy.reduce("SUM", tf.convert_to_tensor(values), axis=None).numpy()


def _words(size):
    return -(-size // _WORD)


def _to_words(data, count):
    words = np.zeros(count, "int64")
    words.view("uint8")[: data.size] = data
    return words


def _batches(sizes):
    """Groups numbers of arrays in order so that a group has at most `_CHUNK_BYTES`, or one array."""
    batches, total = [], 0
    for number, size in enumerate(sizes):
        if not batches or total + size > _CHUNK_BYTES:
            batches.append([])
            total = 0
        batches[-1].append(number)
        total += size
    return batches


def _dtype_name(dtype):
    # NumPy's own name of bfloat16 and of the other types that TensorFlow adds says only how long they are.
    return dtype.name if dtype.kind == "V" or dtype.name == "bfloat16" else dtype.str


def _dtype(name):
    return np.dtype(tf.dtypes.as_dtype(name).as_numpy_dtype if name.isidentifier() else name)
