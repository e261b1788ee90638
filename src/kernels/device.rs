//! What a driver needs of a device, and nothing more.

use super::Error;

/// One stream of one device. Everything called on it runs in the order of the calls, after the call
/// has returned; only [`download`](Self::download) and [`synchronize`](Self::synchronize) wait.
///
/// Memory is a plain address: whoever allocates keeps the books. Safe code that calls a driver relies
/// on its caller's promise about those addresses, which is why every method that takes one is unsafe.
pub trait Device {
    /// A point in the stream's time.
    type Event;

    /// Reserves `bytes` of device memory, aligned to 256 bytes, contents undefined.
    ///
    /// # Errors
    /// [`Error::Device`] where the device has no room.
    fn alloc(&self, bytes: usize) -> Result<u64, Error>;

    /// Gives memory back once the work queued so far is done with it.
    ///
    /// # Safety
    /// `address` came from [`alloc`](Self::alloc) of this device and is not used by anything queued later.
    unsafe fn free(&self, address: u64) -> Result<(), Error>;

    /// Copies host bytes to the device. `from` may be reused when the call returns.
    ///
    /// # Safety
    /// `to..to + from.len()` is device memory that the caller may write.
    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error>;

    /// Waits for the work queued so far and copies device bytes to the host.
    ///
    /// # Safety
    /// `from..from + to.len()` is initialised device memory.
    unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<(), Error>;

    /// Copies within the device; the ranges do not overlap.
    ///
    /// # Safety
    /// Both ranges are device memory, and the caller may write the one at `to`.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error>;

    /// Sets every byte of a range to `value`.
    ///
    /// # Safety
    /// `to..to + bytes` is device memory that the caller may write.
    unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<(), Error>;

    /// Queues a kernel.
    ///
    /// # Safety
    /// `launch.params` is the kernel's own struct from [`abi`](crate::abi), and every address in it holds
    /// what the struct's comments say until the kernel is done.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error>;

    /// Waits for the work queued so far.
    ///
    /// # Errors
    /// [`Error::Device`] with the failure of any earlier work on the device.
    fn synchronize(&self) -> Result<(), Error>;

    /// Marks the present end of the queue.
    ///
    /// # Errors
    /// [`Error::Device`] where the device fails.
    fn record(&self) -> Result<Self::Event, Error>;

    /// Milliseconds of device time between two events; waits for the later one.
    ///
    /// # Errors
    /// [`Error::Device`] where the device fails.
    fn elapsed_ms(&self, from: &Self::Event, to: &Self::Event) -> Result<f32, Error>;

    /// Major and minor compute capability: what decides which form of a kernel runs.
    fn compute_capability(&self) -> (u32, u32);

    /// Streaming multiprocessors: what a persistent grid is sized by.
    fn multiprocessors(&self) -> u32;
}

/// A kernel and how to start it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch<'a> {
    /// Which kernel.
    pub kernel: Kernel,
    /// Blocks along x, y, z; none is 0.
    pub grid: [u32; 3],
    /// Blocks of a cluster along x, y, z; `[1, 1, 1]` for none.
    pub cluster: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: u32,
    /// The bytes of the kernel's parameter struct.
    pub params: &'a [u8],
}

/// Every kernel there is, by the name its C side has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// `fastkv_decode_f16_64_q8`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeF16D64Q8,
    /// `fastkv_decode_f16_64_q16`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeF16D64Q16,
    /// `fastkv_decode_f16_96_q8`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeF16D96Q8,
    /// `fastkv_decode_f16_96_q16`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeF16D96Q16,
    /// `fastkv_decode_f16_128_q8`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeF16D128Q8,
    /// `fastkv_decode_f16_128_q16`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeF16D128Q16,
    /// `fastkv_decode_f16_256_q8`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeF16D256Q8,
    /// `fastkv_decode_f16_256_q16`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeF16D256Q16,
    /// `fastkv_decode_bf16_64_q8`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeBf16D64Q8,
    /// `fastkv_decode_bf16_64_q16`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeBf16D64Q16,
    /// `fastkv_decode_bf16_96_q8`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeBf16D96Q8,
    /// `fastkv_decode_bf16_96_q16`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeBf16D96Q16,
    /// `fastkv_decode_bf16_128_q8`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeBf16D128Q8,
    /// `fastkv_decode_bf16_128_q16`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeBf16D128Q16,
    /// `fastkv_decode_bf16_256_q8`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeBf16D256Q8,
    /// `fastkv_decode_bf16_256_q16`, with [`abi::DecodeParams`](crate::abi::DecodeParams).
    DecodeBf16D256Q16,
    /// `fastkv_compact`, with [`abi::CompactParams`](crate::abi::CompactParams).
    Compact,
    /// `fastkv_gather_indices`, with [`abi::GatherIndicesParams`](crate::abi::GatherIndicesParams).
    GatherIndices,
    /// `fastkv_gather_kv`, with [`abi::GatherKvParams`](crate::abi::GatherKvParams).
    GatherKv,
    /// `fastkv_gather_rows`, with [`abi::GatherRowsParams`](crate::abi::GatherRowsParams).
    GatherRows,
    /// `fastkv_add`, with [`abi::AddParams`](crate::abi::AddParams).
    Add,
    /// `fastkv_convert`, with [`abi::ConvertParams`](crate::abi::ConvertParams).
    Convert,
    /// `fastkv_embed`, with [`abi::EmbedParams`](crate::abi::EmbedParams).
    Embed,
    /// `fastkv_rms_norm`, with [`abi::RmsNormParams`](crate::abi::RmsNormParams).
    RmsNorm,
    /// `fastkv_rope`, with [`abi::RopeParams`](crate::abi::RopeParams).
    Rope,
    /// `fastkv_sample`, with [`abi::SampleParams`](crate::abi::SampleParams).
    Sample,
    /// `fastkv_silu_mul`, with [`abi::SiluMulParams`](crate::abi::SiluMulParams).
    SiluMul,
    /// `fastkv_pool_scores`, with [`abi::PoolScoresParams`](crate::abi::PoolScoresParams).
    PoolScores,
    /// `fastkv_window_lse`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowLse,
    /// `fastkv_window_partials_f16_64`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowPartialsF16D64,
    /// `fastkv_window_partials_f16_96`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowPartialsF16D96,
    /// `fastkv_window_partials_f16_128`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowPartialsF16D128,
    /// `fastkv_window_partials_f16_256`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowPartialsF16D256,
    /// `fastkv_window_partials_bf16_64`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowPartialsBf16D64,
    /// `fastkv_window_partials_bf16_96`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowPartialsBf16D96,
    /// `fastkv_window_partials_bf16_128`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowPartialsBf16D128,
    /// `fastkv_window_partials_bf16_256`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowPartialsBf16D256,
    /// `fastkv_window_scores_f16_64`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowScoresF16D64,
    /// `fastkv_window_scores_f16_96`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowScoresF16D96,
    /// `fastkv_window_scores_f16_128`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowScoresF16D128,
    /// `fastkv_window_scores_f16_256`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowScoresF16D256,
    /// `fastkv_window_scores_bf16_64`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowScoresBf16D64,
    /// `fastkv_window_scores_bf16_96`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowScoresBf16D96,
    /// `fastkv_window_scores_bf16_128`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowScoresBf16D128,
    /// `fastkv_window_scores_bf16_256`, with [`abi::WindowScoresParams`](crate::abi::WindowScoresParams).
    WindowScoresBf16D256,
}

impl Kernel {
    /// All of them; `ALL[kernel as usize] == kernel`.
    pub const ALL: &'static [Self] = &[
        Self::DecodeF16D64Q8,
        Self::DecodeF16D64Q16,
        Self::DecodeF16D96Q8,
        Self::DecodeF16D96Q16,
        Self::DecodeF16D128Q8,
        Self::DecodeF16D128Q16,
        Self::DecodeF16D256Q8,
        Self::DecodeF16D256Q16,
        Self::DecodeBf16D64Q8,
        Self::DecodeBf16D64Q16,
        Self::DecodeBf16D96Q8,
        Self::DecodeBf16D96Q16,
        Self::DecodeBf16D128Q8,
        Self::DecodeBf16D128Q16,
        Self::DecodeBf16D256Q8,
        Self::DecodeBf16D256Q16,
        Self::Compact,
        Self::GatherIndices,
        Self::GatherKv,
        Self::GatherRows,
        Self::Add,
        Self::Convert,
        Self::Embed,
        Self::RmsNorm,
        Self::Rope,
        Self::Sample,
        Self::SiluMul,
        Self::PoolScores,
        Self::WindowLse,
        Self::WindowPartialsF16D64,
        Self::WindowPartialsF16D96,
        Self::WindowPartialsF16D128,
        Self::WindowPartialsF16D256,
        Self::WindowPartialsBf16D64,
        Self::WindowPartialsBf16D96,
        Self::WindowPartialsBf16D128,
        Self::WindowPartialsBf16D256,
        Self::WindowScoresF16D64,
        Self::WindowScoresF16D96,
        Self::WindowScoresF16D128,
        Self::WindowScoresF16D256,
        Self::WindowScoresBf16D64,
        Self::WindowScoresBf16D96,
        Self::WindowScoresBf16D128,
        Self::WindowScoresBf16D256,
    ];

    /// The image that holds it: the name of its source file without `.cu`.
    pub const fn image(self) -> &'static str {
        match self {
            Self::DecodeF16D64Q8
            | Self::DecodeF16D64Q16
            | Self::DecodeF16D96Q8
            | Self::DecodeF16D96Q16
            | Self::DecodeF16D128Q8
            | Self::DecodeF16D128Q16
            | Self::DecodeF16D256Q8
            | Self::DecodeF16D256Q16
            | Self::DecodeBf16D64Q8
            | Self::DecodeBf16D64Q16
            | Self::DecodeBf16D96Q8
            | Self::DecodeBf16D96Q16
            | Self::DecodeBf16D128Q8
            | Self::DecodeBf16D128Q16
            | Self::DecodeBf16D256Q8
            | Self::DecodeBf16D256Q16 => "decode",
            Self::Compact | Self::GatherIndices | Self::GatherKv | Self::GatherRows => "gather",
            Self::Add | Self::Convert | Self::SiluMul => "activation",
            Self::Embed => "embed",
            Self::RmsNorm => "norm",
            Self::Rope => "rope",
            Self::Sample => "sample",
            Self::PoolScores
            | Self::WindowLse
            | Self::WindowPartialsF16D64
            | Self::WindowPartialsF16D96
            | Self::WindowPartialsF16D128
            | Self::WindowPartialsF16D256
            | Self::WindowPartialsBf16D64
            | Self::WindowPartialsBf16D96
            | Self::WindowPartialsBf16D128
            | Self::WindowPartialsBf16D256
            | Self::WindowScoresF16D64
            | Self::WindowScoresF16D96
            | Self::WindowScoresF16D128
            | Self::WindowScoresF16D256
            | Self::WindowScoresBf16D64
            | Self::WindowScoresBf16D96
            | Self::WindowScoresBf16D128
            | Self::WindowScoresBf16D256 => "scores",
        }
    }

    /// The name to look it up by in that image.
    pub const fn entry(self) -> &'static str {
        match self {
            Self::DecodeF16D64Q8 => "fastkv_decode_f16_64_q8",
            Self::DecodeF16D64Q16 => "fastkv_decode_f16_64_q16",
            Self::DecodeF16D96Q8 => "fastkv_decode_f16_96_q8",
            Self::DecodeF16D96Q16 => "fastkv_decode_f16_96_q16",
            Self::DecodeF16D128Q8 => "fastkv_decode_f16_128_q8",
            Self::DecodeF16D128Q16 => "fastkv_decode_f16_128_q16",
            Self::DecodeF16D256Q8 => "fastkv_decode_f16_256_q8",
            Self::DecodeF16D256Q16 => "fastkv_decode_f16_256_q16",
            Self::DecodeBf16D64Q8 => "fastkv_decode_bf16_64_q8",
            Self::DecodeBf16D64Q16 => "fastkv_decode_bf16_64_q16",
            Self::DecodeBf16D96Q8 => "fastkv_decode_bf16_96_q8",
            Self::DecodeBf16D96Q16 => "fastkv_decode_bf16_96_q16",
            Self::DecodeBf16D128Q8 => "fastkv_decode_bf16_128_q8",
            Self::DecodeBf16D128Q16 => "fastkv_decode_bf16_128_q16",
            Self::DecodeBf16D256Q8 => "fastkv_decode_bf16_256_q8",
            Self::DecodeBf16D256Q16 => "fastkv_decode_bf16_256_q16",
            Self::Compact => "fastkv_compact",
            Self::GatherIndices => "fastkv_gather_indices",
            Self::GatherKv => "fastkv_gather_kv",
            Self::GatherRows => "fastkv_gather_rows",
            Self::Add => "fastkv_add",
            Self::Convert => "fastkv_convert",
            Self::Embed => "fastkv_embed",
            Self::RmsNorm => "fastkv_rms_norm",
            Self::Rope => "fastkv_rope",
            Self::Sample => "fastkv_sample",
            Self::SiluMul => "fastkv_silu_mul",
            Self::PoolScores => "fastkv_pool_scores",
            Self::WindowLse => "fastkv_window_lse",
            Self::WindowPartialsF16D64 => "fastkv_window_partials_f16_64",
            Self::WindowPartialsF16D96 => "fastkv_window_partials_f16_96",
            Self::WindowPartialsF16D128 => "fastkv_window_partials_f16_128",
            Self::WindowPartialsF16D256 => "fastkv_window_partials_f16_256",
            Self::WindowPartialsBf16D64 => "fastkv_window_partials_bf16_64",
            Self::WindowPartialsBf16D96 => "fastkv_window_partials_bf16_96",
            Self::WindowPartialsBf16D128 => "fastkv_window_partials_bf16_128",
            Self::WindowPartialsBf16D256 => "fastkv_window_partials_bf16_256",
            Self::WindowScoresF16D64 => "fastkv_window_scores_f16_64",
            Self::WindowScoresF16D96 => "fastkv_window_scores_f16_96",
            Self::WindowScoresF16D128 => "fastkv_window_scores_f16_128",
            Self::WindowScoresF16D256 => "fastkv_window_scores_f16_256",
            Self::WindowScoresBf16D64 => "fastkv_window_scores_bf16_64",
            Self::WindowScoresBf16D96 => "fastkv_window_scores_bf16_96",
            Self::WindowScoresBf16D128 => "fastkv_window_scores_bf16_128",
            Self::WindowScoresBf16D256 => "fastkv_window_scores_bf16_256",
        }
    }
}
