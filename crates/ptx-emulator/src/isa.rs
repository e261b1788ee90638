//! What an instruction is once its text is understood: operands are register numbers, opcodes are
//! functions over the lanes of a warp.

use crate::{
    alu::Conversion,
    exec::Class,
    number::{Lanes, Rounding},
};

/// Element type of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    BF16,
    BF16x2,
    F32,
    F64,
    Pred,
}

impl Type {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "b8" => Self::B8,
            "b16" => Self::B16,
            "b32" => Self::B32,
            "b64" => Self::B64,
            "b128" => Self::B128,
            "u8" => Self::U8,
            "u16" => Self::U16,
            "u32" => Self::U32,
            "u64" => Self::U64,
            "s8" => Self::S8,
            "s16" => Self::S16,
            "s32" => Self::S32,
            "s64" => Self::S64,
            "f16" => Self::F16,
            "f16x2" => Self::F16x2,
            "bf16" => Self::BF16,
            "bf16x2" => Self::BF16x2,
            "f32" => Self::F32,
            "f64" => Self::F64,
            "pred" => Self::Pred,
            _ => return None,
        })
    }

    pub(crate) const fn bytes(self) -> u32 {
        match self {
            Self::Pred | Self::B8 | Self::U8 | Self::S8 => 1,
            Self::B16 | Self::U16 | Self::S16 | Self::F16 | Self::BF16 => 2,
            Self::B32 | Self::U32 | Self::S32 | Self::F32 | Self::F16x2 | Self::BF16x2 => 4,
            Self::B64 | Self::U64 | Self::S64 | Self::F64 => 8,
            Self::B128 => 16,
        }
    }

    pub(crate) const fn is_signed(self) -> bool {
        matches!(self, Self::S8 | Self::S16 | Self::S32 | Self::S64)
    }
}

/// A value that an instruction reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    Register(u32),
    Immediate(u64),
    Special(Special),
}

impl Operand {
    /// The register that it is, if it is one.
    pub(crate) const fn register(self) -> Option<u32> {
        match self {
            Self::Register(number) => Some(number),
            _ => None,
        }
    }
}

/// A predicate as read: its register and whether it is negated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Guard {
    pub(crate) register: u32,
    pub(crate) negated: bool,
}

/// `[base + offset]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) base: Operand,
    pub(crate) offset: i64,
}

/// Registers that the machine fills. Vectors carry the axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    Clusterid(u8),
    Nclusterid(u8),
    ClusterCtaid(u8),
    ClusterNctaid(u8),
    ClusterCtarank,
    ClusterNctarank,
    ExplicitCluster,
    Laneid,
    Warpid,
    Nwarpid,
    LanemaskEq,
    LanemaskLt,
    LanemaskLe,
    LanemaskGt,
    LanemaskGe,
    Clock,
    Smid,
    DynamicSharedBase,
    DynamicSharedBytes,
    TotalSharedBytes,
}

/// State spaces of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    /// The CTA's own shared memory.
    Shared,
    /// That of any CTA of the cluster.
    Cluster,
    Local,
    Const,
    Param,
}

/// How an access takes part in the order between threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Plain: two of these, one a write, with nothing between them are a race.
    Weak,
    /// May meet other strong accesses; orders nothing by itself.
    Relaxed,
    Acquire,
    Release,
    AcquireRelease,
}

impl Order {
    pub(crate) const fn acquires(self) -> bool {
        matches!(self, Self::Acquire | Self::AcquireRelease)
    }

    pub(crate) const fn releases(self) -> bool {
        matches!(self, Self::Release | Self::AcquireRelease)
    }
}

pub(crate) type Unary = fn(&Lanes) -> Lanes;
pub(crate) type Binary = fn(&Lanes, &Lanes) -> Lanes;
pub(crate) type Ternary = fn(&Lanes, &Lanes, &Lanes) -> Lanes;
/// One bit for each lane.
pub(crate) type Compare = fn(&Lanes, &Lanes) -> u32;
/// Old value and operand to new value.
pub(crate) type Update = fn(u64, u64) -> u64;

/// An instruction with its guard and its place in the text.
#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub(crate) guard: Option<Guard>,
    pub(crate) op: Op,
    pub(crate) class: Class,
    /// Every register that it names.
    pub(crate) registers: Vec<u32>,
    /// Whether it is a `mov`, which gives a value another name.
    pub(crate) moves: bool,
    pub(crate) line: u32,
    pub(crate) text: String,
}

/// What a carry chain does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Carry {
    pub(crate) subtract: bool,
    pub(crate) reads: bool,
    pub(crate) writes: bool,
    pub(crate) bits: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Logic {
    And,
    Or,
    Xor,
}

impl Logic {
    /// Both sides, for every lane.
    pub(crate) const fn apply(self, a: u32, b: u32) -> u32 {
        match self {
            Self::And => a & b,
            Self::Or => a | b,
            Self::Xor => a ^ b,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Approximation {
    Ex2,
    Lg2,
    Reciprocal,
    ReciprocalRoot,
    Root,
    Sin,
    Cos,
    Tanh,
}

/// One operation. Destinations come first, as in the text; `None` stands for the sink `_`.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Unary {
        apply: Unary,
        d: u32,
        a: Operand,
    },
    Binary {
        apply: Binary,
        d: u32,
        a: Operand,
        b: Operand,
    },
    Ternary {
        apply: Ternary,
        d: u32,
        a: Operand,
        b: Operand,
        c: Operand,
    },
    Convert {
        conversion: Conversion,
        d: u32,
        a: Operand,
        b: Option<Operand>,
    },
    Lop3 {
        table: u8,
        d: u32,
        a: Operand,
        b: Operand,
        c: Operand,
    },
    /// `bfi`.
    Insert {
        bits: u32,
        d: u32,
        a: Operand,
        b: Operand,
        position: Operand,
        length: Operand,
    },
    Approximate {
        function: Approximation,
        flush: bool,
        d: u32,
        a: Operand,
    },
    Divide {
        flush: bool,
        d: u32,
        a: Operand,
        b: Operand,
    },
    /// Add or subtract, with the carry flag read or written.
    Carry {
        carry: Carry,
        d: u32,
        a: Operand,
        b: Operand,
    },
    /// The low or high half of a product, added with carry.
    MultiplyCarry {
        carry: Carry,
        high: bool,
        d: u32,
        a: Operand,
        b: Operand,
        c: Operand,
    },
    Pack {
        d: u32,
        parts: Vec<Operand>,
        bits: u32,
    },
    Unpack {
        parts: Vec<Option<u32>>,
        a: Operand,
        bits: u32,
    },
    Compare {
        apply: Compare,
        p: Option<u32>,
        q: Option<u32>,
        a: Operand,
        b: Operand,
        with: Option<(Logic, Guard)>,
    },
    /// A comparison whose result is a number.
    Set {
        apply: Compare,
        yes: u64,
        d: u32,
        a: Operand,
        b: Operand,
    },
    Select {
        d: u32,
        a: Operand,
        b: Operand,
        p: Guard,
        mask: u64,
    },
    PredicateLogic {
        logic: Logic,
        d: u32,
        a: Guard,
        b: Guard,
    },
    PredicateMove {
        d: u32,
        a: Guard,
    },
    PredicateSet {
        d: u32,
        a: Operand,
    },
    Branch {
        target: u32,
    },
    BranchTable {
        index: Operand,
        targets: Vec<u32>,
    },
    Exit,
    Trap,
    /// `vprintf`: where its result and its parameters lie in param space.
    Print {
        result: u64,
        params: [u64; 2],
    },
    /// `__assertfail`: text, file, line and function.
    AssertFail {
        params: [u64; 4],
    },
    /// A hint, or an order that this machine keeps anyway.
    Nothing,
    /// `nanosleep`: the others first.
    Yield,
    Load {
        space: Space,
        ty: Type,
        order: Order,
        constant: bool,
        d: Vec<Option<u32>>,
        address: Address,
    },
    Store {
        space: Space,
        ty: Type,
        order: Order,
        address: Address,
        a: Vec<Operand>,
    },
    /// `d` is absent for `red`, `c` is the second operand of `cas`.
    Atomic {
        space: Space,
        ty: Type,
        order: Order,
        update: AtomicUpdate,
        d: Option<u32>,
        address: Address,
        b: Operand,
    },
    ConvertAddress {
        space: Space,
        to_space: bool,
        d: u32,
        a: Operand,
    },
    IsSpace {
        space: Space,
        p: u32,
        a: Operand,
    },
    Fence,
    /// `setmaxnreg`.
    SetRegisters {
        increases: bool,
        count: u32,
    },
    /// `bar.sync`, `bar.arrive`, `barrier.*`, `bar.red`.
    Barrier {
        waits: bool,
        aligned: bool,
        id: Operand,
        threads: Option<Operand>,
        reduce: Option<(Reduce, u32, Guard)>,
    },
    ClusterArrive {
        aligned: bool,
        releases: bool,
    },
    ClusterWait {
        aligned: bool,
    },
    /// `mapa`.
    MapAddress {
        space: Space,
        d: u32,
        a: Operand,
        rank: Operand,
    },
    /// `getctarank`.
    AddressRank {
        space: Space,
        d: u32,
        a: Operand,
    },
    WarpSync {
        mask: Operand,
    },
    Shuffle {
        mode: Shuffle,
        d: u32,
        p: Option<u32>,
        a: Operand,
        b: Operand,
        c: Operand,
        mask: Operand,
    },
    Vote {
        mode: Vote,
        d: u32,
        a: Guard,
        mask: Operand,
    },
    ActiveMask {
        d: u32,
    },
    Match {
        all: bool,
        ty: Type,
        d: u32,
        p: Option<u32>,
        a: Operand,
        mask: Operand,
    },
    Redux {
        combine: Update,
        d: u32,
        a: Operand,
        mask: Operand,
    },
    Elect {
        d: Option<u32>,
        p: u32,
        mask: Operand,
    },
    CopyAsync {
        bytes: u32,
        to: Address,
        from: Address,
        size: Option<Operand>,
        ignore: Option<Guard>,
    },
    CommitGroup,
    /// Waits until at most so many groups are unfinished; `None` for every copy, committed or not.
    WaitGroup {
        pending: Option<u32>,
    },
    LoadMatrix {
        count: u32,
        transposed: bool,
        d: Vec<u32>,
        address: Address,
    },
    StoreMatrix {
        count: u32,
        transposed: bool,
        address: Address,
        a: Vec<Operand>,
    },
    /// `movmatrix`.
    TransposeMatrix {
        d: u32,
        a: Operand,
    },
    /// `m16n8k16` or `m16n8k8`.
    MultiplyMatrix {
        input: MatrixType,
        half_result: bool,
        k: u32,
        d: Vec<u32>,
        a: Vec<Operand>,
        b: Vec<Operand>,
        c: Vec<Operand>,
    },
    /// `cp.async.bulk`. What comes to shared memory is counted at an mbarrier, and may come to several
    /// CTAs at once, those in `ctas`.
    Bulk {
        from: Space,
        to: Space,
        source: Address,
        destination: Address,
        bytes: Operand,
        barrier: Option<Address>,
        ctas: Option<Operand>,
    },
    BulkTensor {
        loads: bool,
        shared: Address,
        map: Address,
        coordinates: Vec<Operand>,
        barrier: Option<Address>,
        ctas: Option<Operand>,
    },
    /// `st.async`.
    StoreAsync {
        space: Space,
        ty: Type,
        address: Address,
        a: Vec<Operand>,
        barrier: Address,
    },
    BulkCommit,
    Product(Product),
    ProductFence,
    ProductCommit,
    ProductWait {
        pending: u32,
    },
    /// `reads` where only the sources have to be free again.
    BulkWait {
        pending: u32,
        reads: bool,
    },
    ProxyFence,
    BarrierInit {
        space: Space,
        address: Address,
        count: Operand,
    },
    BarrierInvalidate {
        space: Space,
        address: Address,
    },
    BarrierArrive {
        space: Space,
        address: Address,
        state: Option<u32>,
        count: Operand,
        expect: Option<Operand>,
        drop: bool,
        complete: bool,
    },
    BarrierExpect {
        space: Space,
        address: Address,
        bytes: Operand,
    },
    BarrierComplete {
        space: Space,
        address: Address,
        bytes: Operand,
    },
    BarrierTest {
        space: Space,
        address: Address,
        p: u32,
        phase: Operand,
        parity: bool,
        blocks: bool,
    },
    BarrierCopies {
        space: Space,
        address: Address,
        counted: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MatrixType {
    F16,
    BF16,
}

/// `wgmma.mma_async` of m64nNk16.
#[derive(Clone, Debug)]
pub(crate) struct Product {
    pub(crate) n: u32,
    pub(crate) input: MatrixType,
    /// Whether results are f16, two in a register, rather than f32.
    pub(crate) half_result: bool,
    pub(crate) d: Vec<u32>,
    /// A descriptor, or four registers.
    pub(crate) a: Vec<Operand>,
    pub(crate) b: Operand,
    /// Whether the result is added to what `d` holds, as a number or a predicate.
    pub(crate) accumulate: bool,
    pub(crate) accumulate_if: Option<Guard>,
    /// Whether one of the factors is negated.
    pub(crate) negate: bool,
    pub(crate) transpose_a: bool,
    pub(crate) transpose_b: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduce {
    Count,
    And,
    Or,
}

/// How an atomic changes memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AtomicUpdate {
    Apply(Update),
    /// Writes the operand where memory holds what `b` holds.
    CompareSwap(Operand),
}

/// Rounding suffix of an opcode.
pub(crate) fn rounding(word: &str) -> Option<Rounding> {
    Some(match word {
        "rn" | "rni" => Rounding::Nearest,
        "rna" => Rounding::NearestAway,
        "rz" | "rzi" => Rounding::Zero,
        "rm" | "rmi" => Rounding::Down,
        "rp" | "rpi" => Rounding::Up,
        _ => return None,
    })
}
