"""The CUDA extension; see csrc/bindings.cpp and csrc/api.h. Launchers return CUDA's error code."""

# An address, 0 for None, and a dtype's number in grpo_fast.cuda.DTYPES.
_Tensor = tuple[int, int]

architectures: str
cuda_version: str
PARTIAL: int
SPARSE_SAMPLE: int
TILE_WORDS: int
BAND_ROWS: int

class Layout:
    cluster: int
    consumers: int
    stages: int
    def __init__(self, cluster: int, consumers: int, stages: int) -> None: ...
    @property
    def chunk_bytes(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...

class Rows:
    def __init__(
        self,
        *,
        logits: _Tensor,
        strides: tuple[int, ...],
        out: _Tensor,
        out_strides: tuple[int, ...],
        count: int,
        T: int,
        V: int,
        ids: _Tensor,
        has_softcap: bool,
        slope: float,
        cap: float,
        cap_in: float,
    ) -> None: ...

def error_string(code: int) -> str: ...

class Loss:
    def __init__(
        self,
        *,
        count: int,
        T: int,
        N: int,
        mask: _Tensor,
        ends: _Tensor,
        entropy_mask: _Tensor,
        advantages: _Tensor,
        per_token_advantages: bool,
        rewards: _Tensor,
        group_size: int,
        scale_rewards: int,
        sampler_ratio: _Tensor,
        per_token_sampler_ratio: bool,
        reduction: int,
        divisor: float,
        num_items: _Tensor,
        token_weights: _Tensor,
        entropy_coef: float,
        entropy_items: _Tensor,
        old_logps: _Tensor,
        ref_logps: _Tensor,
        entropy_threshold: _Tensor,
        term: int,
        kl_estimator: int,
        has_dual_clip: bool,
        bias_correction: bool,
        low: float,
        high: float,
        delta: float,
        dual_clip: float,
        beta: float,
        tau_pos: float,
        tau_neg: float,
        plan_values: int,
        kept: int,
        zero_std: int,
        d_entropy: int,
        logps: int,
        entropies: int,
        losses: int,
        kls: int,
        ratios: int,
        clips: int,
    ) -> None: ...

class Head:
    def __init__(
        self,
        *,
        hidden: _Tensor,
        hidden_stride: int,
        weight: _Tensor,
        weight_stride: int,
        bias: int,
        count: int,
        V: int,
        H: int,
        counted: int,
        ids: _Tensor,
        has_softcap: bool,
        slope: float,
        cap: float,
        cap_in: float,
        multiprocessors: int,
    ) -> None: ...

class Exponentials:
    def __init__(self, *, first: tuple[int, int], rest: tuple[int, int], split: int, bases: int) -> None: ...

class Conversion:
    def __init__(self, *, head: Head, exponentials: Exponentials, slopes: int, tilted: bool) -> None: ...

class SparseLimits:
    def __init__(self, *, totals: int, room: tuple[int, int], most_dense: int) -> None: ...

def grpo_loss_rows(*, device: int, stream: int, rows: Rows, layout: Layout, loss: Loss) -> int: ...
def sum_rows(
    *,
    device: int,
    stream: int,
    count: int,
    T: int,
    N: int,
    mask: _Tensor,
    ends: _Tensor,
    entropy_mask: _Tensor,
    entropies: int,
    losses: int,
    kls: int,
    ratios: int,
    clips: int,
    zero_std: int,
    entropy_coef: float,
    partials: int,
    results: int,
) -> int: ...
def log_probs(
    *,
    device: int,
    stream: int,
    rows: Rows,
    layout: Layout,
    kept: int,
    logps: int,
    entropies: int,
    shifts: int,
    totals: int,
) -> int: ...
def linear_lanes(count: int, multiprocessors: int) -> int: ...
def linear_lanes_at_most(multiprocessors: int) -> int: ...
def linear_product(
    *,
    device: int,
    stream: int,
    head: Head,
    exponentials: Exponentials,
    partials: tuple[int, int, int],
    meanwhile: Conversion | None,
    next_slice: int,
) -> int: ...
def linear_log_probs(
    *,
    device: int,
    stream: int,
    head: Head,
    partials: tuple[int, int, int],
    logps: int,
    entropies: int,
    shifts: int,
    totals: int,
) -> int: ...
def linear_loss(
    *, device: int, stream: int, head: Head, partials: tuple[int, int, int], loss: Loss, slopes: int
) -> int: ...
def linear_slopes(
    *,
    device: int,
    stream: int,
    head: Head,
    kept: int,
    logps: int,
    entropies: int,
    shifts: int,
    totals: int,
    d_logps: int,
    d_entropies: int,
    slopes: int,
) -> int: ...
def linear_gradient_by_product(
    *, device: int, stream: int, head: Head, place: Exponentials, slopes: int, tilted: bool
) -> int: ...
def linear_gradient(*, device: int, stream: int, conversion: Conversion, which: int, count: int) -> int: ...
def sparse_rows(
    *,
    device: int,
    stream: int,
    head: Head,
    exponentials: Exponentials,
    slopes: int,
    tilted: bool,
    usual: int,
    tolerance: float,
    keys: int,
    values: int,
    starts: int,
    ends: int,
    limits: SparseLimits,
    first_row: int,
    most: tuple[int, int],
    sample: int,
    sampled: int,
) -> int: ...
def sum_of_rows(
    *,
    device: int,
    stream: int,
    starts: int,
    ends: int,
    index: int,
    weights: int,
    matrix: _Tensor,
    stride: int,
    rows: int,
    width: int,
    base: int,
    out: _Tensor,
    limits: SparseLimits,
) -> int: ...
def log_probs_gradient(
    *,
    device: int,
    stream: int,
    rows: Rows,
    kept: int,
    logps: int,
    entropies: int,
    shifts: int,
    totals: int,
    d_logps: int,
    d_entropies: int,
) -> int: ...
def scale_gradient(
    *,
    device: int,
    stream: int,
    gradient: _Tensor,
    strides: tuple[int, ...],
    count: int,
    T: int,
    V: int,
    factor: int,
) -> int: ...
