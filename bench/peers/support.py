"""What the peers' programs share: who is there, how time is taken, what is written."""

import functools
import importlib
import importlib.metadata
import json
import os
import pathlib
import statistics
import time

WHERE = {
    "bitsandbytes": "the wheel's Python files and libbitsandbytes_cuda130.so",
    "liger_kernel": "the wheel's Python files",
    "transformers": "pip install transformers",
    "peft": "pip install peft",
}


START = time.monotonic()


def time_is_up():
    """QLAB_BENCH_SECONDS: nothing new is begun once they have passed."""
    limit = os.environ.get("QLAB_BENCH_SECONDS")
    return bool(limit) and time.monotonic() - START > float(limit)


class Report:
    """Rows, and the peers that could not be asked, with the reason."""

    def __init__(self):
        self.rows, self.missing, self.versions = [], {}, {}

    def left_out(self, name):
        if time_is_up():
            print(f"{name} left out: QLAB_BENCH_SECONDS have passed", flush=True)
        return time_is_up()

    def find(self, module):
        """The module; None where it cannot be imported, which the report then says."""
        if module in self.missing:
            return None
        try:
            found = importlib.import_module(module)
        except Exception as error:  # a library that does not load raises what it likes
            reason = (f"{type(error).__name__}: {error}. Put it on PYTHONPATH "
                      f"({WHERE.get(module, 'see its documentation')})")
            self.missing[module] = reason
            print(f"MISSING PEER {module}: {reason}", flush=True)
            return None
        self.versions[module] = importlib.metadata.version(module)
        return found

    def add(self, name, **fields):
        self.rows.append({"name": name, **fields})
        shown = ", ".join(f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in fields.items() if not isinstance(value, list))
        print(f"{name}: {shown}", flush=True)

    def write(self, path):
        import torch
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda,
                    "cudnn": torch.backends.cudnn.version(), **self.versions}
        result = {"device": torch.cuda.get_device_name(), "versions": versions,
                  "missing": self.missing, "rows": self.rows}
        if path:
            pathlib.Path(path).write_text(json.dumps(result) + "\n")


@functools.cache
def stream():
    """Where graphs are captured: never the default stream."""
    import torch
    return torch.cuda.Stream()


def spread(times):
    """Median, and the median absolute deviation in percent of it."""
    median = statistics.median(times)
    return median, 100 * statistics.median(abs(t - median) for t in times) / median


def event_times(call, samples):
    """Seconds between two events around each call."""
    import torch
    times = []
    for _ in range(samples):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return times


def microseconds(call, inputs=1, graph=True, samples=11, target_s=2e-3):
    """Median time of call(i), i counting through `inputs` inputs, and its noise: device time of a
    CUDA graph of many calls, or, where a call synchronizes, of calls one by one."""
    import torch
    for i in range(2):
        call(i % inputs)
    torch.cuda.synchronize()
    if not graph:
        number = [0]

        def one():
            call(number[0] % inputs)
            number[0] += 1
        median, noise = spread(event_times(one, samples))
        return {"us": median * 1e6, "noise_percent": noise}
    estimate = statistics.median(event_times(lambda: call(0), 3))
    walk = min(inputs, 10e-3 / estimate)
    calls = max(1, min(4096, int(max(target_s / estimate, walk))))
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording, stream=stream()):
        for i in range(calls):
            call(i % inputs)
    event_times(recording.replay, 2)
    median, noise = spread(event_times(recording.replay, samples))
    del recording
    return {"us": median / calls * 1e6, "noise_percent": noise}
