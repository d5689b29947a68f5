"""The kernels of bitsandbytes, PyTorch and Liger on the cases that qlab-bench measures.

    qlab-bench --benchmark_list_tests > cases.txt
    PYTHONPATH=... python bench/peers/kernels.py --cases cases.txt [--filter REGEX] [--output FILE]

A case is a benchmark's name without its last part, the implementation; here that is the peer. Times
are device times of CUDA graphs of many calls, over copies of the inputs that exceed the L2.
"""

import argparse
import pathlib
import re
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import support

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def copies(size):
    """As many as qlab-bench uses."""
    return max(1, min(4096, -(-128_000_000 // max(size, 1))))


def size_of(tensor):
    return tensor.numel() * tensor.element_size()


def normal(*shape, dtype=torch.bfloat16, scale=1.0, grad=False):
    return (torch.randn(*shape, device="cuda", dtype=dtype) * scale).requires_grad_(grad)


def numbers(text):
    return [int(n) for n in text.split("x")]


class Kernels:
    def __init__(self, report):
        self.report = report
        self.weights_key, self.weights = None, None

    def measure(self, case, peer, call, inputs=1, graph=True):
        """A failure of the peer is a row that says so."""
        try:
            self.report.add(f"{case}/{peer}", **support.microseconds(call, inputs, graph))
        except Exception as error:
            self.report.add(f"{case}/{peer}", error=f"{type(error).__name__}: {error}"[:300])

    def nf4(self, case, parts):
        """dequantize and quantize: SHAPE/bBLOCK/nested|plain/DTYPE[/pitched]"""
        bnb = self.report.find("bitsandbytes")
        if bnb is None or "pitched" in parts:
            return
        functional = bnb.functional
        op, (n, k), block = parts[0], numbers(parts[1]), int(parts[2][1:])
        options = dict(blocksize=block, quant_type="nf4", compress_statistics=parts[3] == "nested")
        dense = normal(n, k, dtype=DTYPES[parts[4]], scale=0.02)
        if op == "quantize":
            inputs = [dense] + [dense.clone() for _ in range(copies(size_of(dense)) - 1)]
            self.measure(case, "bitsandbytes",
                         lambda i: functional.quantize_4bit(inputs[i], **options), len(inputs),
                         graph=False)
            return
        try:
            stored = [functional.quantize_4bit(dense, **options) for _ in range(copies(n * k // 2))]
        except Exception as error:
            self.report.add(f"{case}/bitsandbytes", error=f"{type(error).__name__}: {error}"[:300])
            return
        self.measure(case, "bitsandbytes", lambda i: functional.dequantize_4bit(*stored[i]),
                     len(stored))

    def linear_weights(self, n, k, bnb):
        if self.weights_key != (n, k):
            self.weights = None
            torch.cuda.empty_cache()
            dense = [normal(n, k, scale=0.02) for _ in range(copies(2 * n * k))]
            stored = bnb and [bnb.functional.quantize_4bit(dense[0], quant_type="nf4",
                                                           compress_statistics=True)
                              for _ in range(copies(n * k // 2))]
            self.weights_key, self.weights = (n, k), (dense, stored)
        return self.weights

    def linear(self, case, parts):
        """linear/forward|dx/NxK/mM"""
        bnb = self.report.find("bitsandbytes")
        forward, (n, k), m = parts[1] == "forward", numbers(parts[2]), int(parts[3][1:])
        dense, stored = self.linear_weights(n, k, bnb)
        cols = k if forward else n
        xs = [normal(m, cols) for _ in range(copies(2 * m * cols))]

        def plain(i):
            x, weight = xs[i % len(xs)], dense[i % len(dense)]
            return F.linear(x, weight) if forward else x @ weight
        self.measure(case, "torch", plain, max(len(dense), len(xs)))
        if bnb is None:
            return

        def quantized(i):
            x, (codes, state) = xs[i % len(xs)], stored[i % len(stored)]
            if forward:
                return bnb.matmul_4bit(x, codes.t(), quant_state=state)
            return x @ bnb.functional.dequantize_4bit(codes, state)
        self.measure(case, "bitsandbytes", quantized, max(len(stored), len(xs)))

    def attention(self, case, parts):
        """attention/forward|backward/BxS/hHkKdD; cuDNN and FlashAttention-2 through SDPA"""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        if not re.fullmatch(r"\d+x\d+", parts[2]):
            return  # packed: SDPA takes none
        batch, length = numbers(parts[2])
        heads, kv_heads, dim = map(int, re.fullmatch(r"h(\d+)k(\d+)d(\d+)", parts[3]).groups())
        for peer, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION),
                              ("flash2", SDPBackend.FLASH_ATTENTION)):
            size = 4 * batch * length * (heads + kv_heads) * dim
            inputs = [[normal(batch, h, length, dim, grad=True)
                       for h in (heads, kv_heads, kv_heads)] for _ in range(copies(size))]

            def call(i):
                return F.scaled_dot_product_attention(*inputs[i], is_causal=True, enable_gqa=True)
            with sdpa_kernel(backend):
                if parts[1] == "forward":
                    with torch.no_grad():
                        self.measure(case, peer, call, len(inputs))
                    continue
                try:
                    self.backward(case, peer, [call(i) for i in range(len(inputs))], inputs)
                except Exception as error:
                    self.report.add(f"{case}/{peer}", error=f"{type(error).__name__}: {error}"[:300])

    def backward(self, case, peer, outputs, inputs):
        """The gradients of inputs[i] from outputs[i], which are kept."""
        gradients = [torch.randn_like(output) for output in outputs]
        self.measure(case, peer, lambda i: torch.autograd.grad(outputs[i], inputs[i], gradients[i],
                                                               retain_graph=True), len(outputs))

    def liger(self, case, parts):
        """rms_norm, swiglu: OP/forward|backward/TxC; cross_entropy/TxV; rope/forward/TxHxD"""
        if self.report.find("liger_kernel") is None:
            return
        op, sizes = parts[0], numbers(parts[-1])
        try:
            output, inputs, call = getattr(self, "liger_" + op)(*sizes)
        except Exception as error:
            self.report.add(f"{case}/liger", error=f"{type(error).__name__}: {error}"[:300])
            return
        if parts[1] == "backward":
            self.backward(case, "liger", [output], [inputs])
        else:
            # Its cross entropy reads the number of labels back, so it fits into no graph.
            loss = op == "cross_entropy"
            with torch.set_grad_enabled(loss):
                self.measure(case, "liger", call, graph=not loss)

    def liger_rms_norm(self, rows, cols):
        from liger_kernel.transformers import LigerRMSNorm
        norm = LigerRMSNorm(cols, eps=1e-5, in_place=False).to("cuda", torch.bfloat16)
        norm.weight.requires_grad_(False)
        x = normal(rows, cols, grad=True)
        return norm(x), (x,), lambda i: norm(x)

    def liger_swiglu(self, rows, cols):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
        gate, up = normal(rows, cols, grad=True), normal(rows, cols, grad=True)
        call = lambda i: LigerSiLUMulFunction.apply(gate, up)
        return call(0), (gate, up), call

    def liger_rope(self, rows, heads, dim):
        from liger_kernel.ops.rope import LigerRopeFunction
        q, k = normal(1, heads, rows, dim), normal(1, 1, rows, dim)
        angle = torch.rand(1, rows, dim, device="cuda") * 6.28
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        return None, (), lambda i: LigerRopeFunction.apply(q, k, cos, sin)

    def liger_cross_entropy(self, rows, vocabulary):
        """Like ours, it replaces the logits by their gradient in the forward pass."""
        from liger_kernel.transformers import LigerCrossEntropyLoss
        z = normal(rows, vocabulary, grad=True)
        labels = torch.randint(0, vocabulary, (rows,), device="cuda")
        loss = LigerCrossEntropyLoss()
        return None, (), lambda i: loss(z, labels)

    def adamw(self, case, parts):
        """adamw/PARAMETERS: norm, clipping and update of one flat buffer"""
        p = torch.nn.Parameter(normal(int(parts[1]), dtype=torch.float32))
        p.grad = torch.randn_like(p) * 1e-3
        makers = {"torch": lambda: torch.optim.AdamW([p], lr=1e-4, fused=True, capturable=True)}
        bnb = self.report.find("bitsandbytes")
        if bnb is not None:
            makers["bitsandbytes"] = lambda: bnb.optim.AdamW32bit([p], lr=1e-4)
        for peer, make in makers.items():
            optimizer = make()

            def step(i):
                torch.nn.utils.clip_grad_norm_([p], 1.0)
                optimizer.step()
            # bitsandbytes takes the number of the step from the host, so a graph would repeat one.
            self.measure(case, peer, step, graph=peer == "torch")


HANDLERS = {"dequantize": Kernels.nf4, "quantize": Kernels.nf4, "linear": Kernels.linear,
            "attention": Kernels.attention, "rms_norm": Kernels.liger, "swiglu": Kernels.liger,
            "rope": Kernels.liger, "cross_entropy": Kernels.liger, "adamw": Kernels.adamw}


def cases(lines, pattern):
    """The benchmarks' names without device, implementation and Google Benchmark's own suffixes."""
    found = {}
    for line in lines:
        name = re.sub(r"/(iterations|repeats|min_time):.*|/manual_time|/real_time", "",
                      line.strip())
        if name.startswith("cuda/") and name.count("/") >= 2:
            case = name.rsplit("/", 1)[0].removeprefix("cuda/")
            if case.split("/")[0] in HANDLERS and re.search(pattern, case):
                found[case] = None
    return list(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", required=True, help="output of qlab-bench's list of tests")
    parser.add_argument("--filter", default="")
    parser.add_argument("--output")
    options = parser.parse_args()
    report = support.Report()
    kernels = Kernels(report)
    torch.manual_seed(0)
    # One stream for everything: autograd runs a backward on the stream of its forward.
    with torch.cuda.stream(support.stream()):
        for case in cases(pathlib.Path(options.cases).read_text().splitlines(), options.filter):
            parts = case.split("/")
            if report.left_out(case):
                continue
            HANDLERS[parts[0]](kernels, case, parts)
    report.write(options.output)


if __name__ == "__main__":
    main()
