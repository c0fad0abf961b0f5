"""A program that knows nothing of the simulated device: tinygrad's CUDA back end, with its own
kernels and its own use of the Driver API on two devices, against numpy.
Prints 'N passed, N failed'.

Needs tinygrad, NVRTC and build/sim in front on LD_LIBRARY_PATH. DEV=CUDA: CUDA C through NVRTC,
DEV=CUDA:PTX: PTX that tinygrad writes itself, tensor cores included."""
import ctypes
import os
import sys

os.environ.setdefault("DEV", "CUDA")
import numpy as np
from tinygrad.runtime.autogen import cuda


def create_context(ctx, flags, device):  # the simulated device has primary contexts only
    error = cuda.cuDevicePrimaryCtxRetain(ctx, device)
    return error or cuda.cuCtxSetCurrent(ctypes.cast(ctx, ctypes.POINTER(cuda.CUcontext)).contents)


def capability(major, minor, device):
    for out, attribute in (major, 75), (minor, 76):
        cuda.cuDeviceGetAttribute(ctypes.cast(out, ctypes.POINTER(ctypes.c_int)), attribute, device)
    return 0


cuda.cuCtxCreate_v2, cuda.cuDeviceComputeCapability = create_context, capability
from tinygrad import Tensor, dtypes

counts = [0, 0]
rng = np.random.default_rng(0)


def check(name, got, want, tolerance=2e-5):
    """Largest |got - want| / (1 + |want|)."""
    try:
        got, want = got.numpy().astype(np.float64), np.asarray(want, np.float64)
        error = np.max(np.abs(got - want) / (1 + np.abs(want)))
        good = got.shape == want.shape and error <= tolerance
    except Exception as e:
        good, error = False, str(e)[:150]
    counts[not good] += 1
    if not good:
        print("FAIL", name, error, flush=True)


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


A, B, M, N = normal(33, 47), normal(33, 47), normal(96, 80), normal(80, 112)
P = np.abs(A) + .1
a, b, p = Tensor(A), Tensor(B), Tensor(P)
E = np.exp(A - A.max(1, keepdims=True))
for name, got, want in [
        ("add", a + b, A + B), ("mul", a * b, A * B), ("div", a / p, A / P),
        ("exp", a.exp(), np.exp(A)),
        ("where", (a > b).where(a, b), np.maximum(A, B)), ("sin", a.sin(), np.sin(A)),
        ("tanh", a.tanh(), np.tanh(A)), ("log", p.log(), np.log(P)), ("sqrt", p.sqrt(), np.sqrt(P)),
        ("sum", a.sum(0), A.sum(0)), ("max", a.max(1), A.max(1)),
        ("argmax", a.argmax(1), A.argmax(1)), ("sort", a.sort(1)[0], np.sort(A, 1)),
        ("softmax", a.softmax(1), E / E.sum(1, keepdims=True)),
        ("cumsum", a.cumsum(1), A.cumsum(1)), ("flip", a.flip(1), A[:, ::-1]),
        ("pad", a.pad(((1, 2), (3, 0))), np.pad(A, ((1, 2), (3, 0)))),
        ("index", a[Tensor([3, 1, 4])], A[[3, 1, 4]]), ("matmul", Tensor(M) @ Tensor(N), M @ N)]:
    check(name, got, want, 1e-4)
for kind, tolerance in (dtypes.half, 3e-2), (dtypes.bfloat16, 3e-1):  # tensor cores
    product = Tensor(M).cast(kind).matmul(Tensor(N).cast(kind), dtype=dtypes.float)
    check(f"matmul {kind}", product, M @ N, tolerance)
X, W = normal(2, 5, 14, 14), normal(7, 5, 3, 3)
C = sum(np.einsum("bchw,oc->bohw", X[:, :, i:i + 12, j:j + 12], W[:, :, i, j])
        for i in range(3) for j in range(3))
check("convolution", Tensor(X).conv2d(Tensor(W)), C, 1e-4)
Q, K, V = normal(1, 4, 24, 32), normal(1, 4, 24, 32), normal(1, 4, 24, 32)
S = np.exp(Q @ K.transpose(0, 1, 3, 2) / np.sqrt(32))
attention = Tensor(Q).scaled_dot_product_attention(Tensor(K), Tensor(V))
check("attention", attention, S / S.sum(-1, keepdims=True) @ V, 1e-4)
for kind in "int8 uint8 int16 uint16 int32 uint32 int64 uint64".split():
    I = rng.integers(0 if kind[0] == "u" else -100, 100, 41).astype(kind)
    J = rng.integers(1, 12, 41).astype(kind)
    i, j = Tensor(I), Tensor(J)
    for name, got, want in [("+", i + j, I + J), ("*", i * j, I * J), ("//", i // j, I // J),
                            ("%", i % j, I % J), ("^", i ^ j, I ^ J), ("&", i & j, I & J),
                            ("max", i.maximum(j), np.maximum(I, J))]:
        check(f"{kind} {name}", got, want, 0)
    check(f"{kind} to float", i.cast(dtypes.float), I, 0)
check("to half", a.cast(dtypes.half).contiguous().cast(dtypes.float), A.astype(np.float16), 0)
check("to int", a.cast(dtypes.int), np.trunc(A), 0)
D = P.astype(np.float64)
d = p.cast(dtypes.double)
check("double", (d * d - 2) * d + d.maximum(1), (D * D - 2) * D + np.maximum(D, 1), 1e-14)
check("other device", (a.to("CUDA:1") * 2).to("CUDA:0") + 1, A * 2 + 1)
two = ("CUDA:0", "CUDA:1")
check("rows on two devices", Tensor(M).shard(two, 0) @ Tensor(N).shard(two), M @ N, 1e-4)
check("columns on two devices", Tensor(M).shard(two, 1) @ Tensor(N).shard(two, 0), M @ N, 1e-4)
print(f"{counts[0]} passed, {counts[1]} failed")
sys.exit(counts[1] > 0)
