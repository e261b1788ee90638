use fastkv::abi::{Kept, Pages, Pooling, Rows, Slots};
use fastkv::kernels::batch::{Lengths, Logarithm, Lse, ScoreHeads, ScoreRows, Scores, Window, default_scale};
use fastkv::kernels::gather::{GatherKv, gather_kv};
use fastkv::kernels::scores::{WindowScores, window_scores, window_scores_workspace};
use fastkv::kernels::select::{SelectTopk, select_topk, select_topk_workspace};
use fastkv::kernels::{DType, Error, Launcher};

const DTYPE: DType = DType::BF16;
/// Queries at the end of each prompt, by which its keys are scored.
const WINDOW: u32 = 8;

/// A layer's cache, and the largest batch of prompts that it is to take: lengths lie on the device and may be less. A
/// place that is not in use has a length of 0 and an empty chunk.
#[derive(Clone, Copy)]
pub struct Layer {
    pub query_heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub sequences: u32,
    /// Tokens of the last chunks of all prompts together, and of one, which is no more.
    pub chunk_tokens: u32,
    pub longest_chunk: u32,
    /// Tokens of a prompt, at most `table_pages * page_size`.
    pub longest: u32,
    /// Tokens that are kept of a prompt, the window's among them; a prompt that has no more is kept as it is.
    pub capacity: u32,
    pub page_size: u32,
    pub pages: u32,
    /// Pages of a sequence, at most.
    pub table_pages: u32,
}

/// Device addresses of what the engine has when its attention has read the last chunks. A chunk has the window's
/// queries or more, unless it is the whole prompt.
#[derive(Clone, Copy)]
pub struct Prompts {
    /// `[chunk_tokens, query_heads, head_dim]`, rotated.
    pub q: u64,
    /// f32 `[chunk_tokens, query_heads]`, of base 2.
    pub lse: u64,
    /// i32 `[sequences + 1]`: where chunks begin.
    pub cu_seqlens: u64,
    /// `[pages, page_size, kv_heads, head_dim]`.
    pub k_pages: u64,
    pub v_pages: u64,
    /// i32 `[sequences, table_pages]`.
    pub table: u64,
    /// i32 `[sequences]`: tokens of each prompt.
    pub lengths: u64,
}

/// Device addresses of what is kept of every prompt, one set of tokens for all heads.
#[derive(Clone, Copy)]
pub struct Choice {
    /// Receives f32 `[sequences, query_heads, longest]`.
    pub scores: u64,
    /// Receives i32 `[sequences, capacity]`, ascending, -1 behind the last.
    pub kept: u64,
    /// Receives i32 `[sequences]`: how many these are, the lengths of the cache from now on. The position of the next
    /// token still counts what was read.
    pub kept_lengths: u64,
    /// i64 `[sequences, capacity]`, given: where each kept token goes, page x page size + place in it. The pages may be
    /// of the same pool, but none that a prompt of this batch lies in. What stands behind the last does not matter.
    pub slots: u64,
    /// i64 `[sequences, kv_heads]`, given: `sequence * capacity` for every head, so that heads share slots.
    pub starts: u64,
}

/// Scratch memory, aligned to 256 bytes.
#[derive(Clone, Copy)]
pub struct Workspace {
    pub address: u64,
    pub bytes: usize,
}

impl Layer {
    /// What [`compress`](Self::compress) can do with. Only sizes count here, so addresses may be 0.
    pub fn workspace(
        &self,
        launcher: &impl Launcher,
        prompts: &Prompts,
        choice: &Choice,
    ) -> Result<usize, Error> {
        let none = Workspace { address: 0, bytes: 0 };
        let scores = window_scores_workspace(&self.scores(prompts, choice, none))?;
        Ok(scores.max(select_topk_workspace(launcher, &self.selection(prompts, choice, none))?))
    }

    /// Scores of all keys where they lie, the choice, and the kept keys and values in pages of their own. Can be
    /// captured in a graph. Pages of a prompt are free when every layer that shares its table is done.
    ///
    /// # Safety
    /// Every address holds what is said of it until the work is done, and nobody else touches what is written.
    pub unsafe fn compress(
        &self,
        launcher: &impl Launcher,
        prompts: &Prompts,
        choice: &Choice,
        workspace: Workspace,
    ) -> Result<(), Error> {
        let pool = self.pool(prompts.k_pages);
        let moved = GatherKv {
            kept: Kept {
                indices: choice.kept,
                index_sequence_stride: self.capacity.into(),
                // One list for all heads: -1 behind the last says where it ends.
                index_head_stride: 0,
                starts: choice.starts,
                out_rows: i64::from(self.sequences) * i64::from(self.capacity),
                sequences: self.sequences as i32,
                heads: self.kv_heads as i32,
                tokens: self.longest as i32,
                capacity: self.capacity as i32,
                ..Kept::default()
            },
            k: pool,
            v: self.pool(prompts.v_pages),
            pages: self.pages(prompts),
            slots: Slots {
                slots: choice.slots,
                page_stride: pool.sequence_stride,
                head_stride: pool.head_stride,
                slot_stride: pool.token_stride,
                pages: self.pages as i32,
                page_size: self.page_size as i32,
            },
            k_out: prompts.k_pages,
            v_out: prompts.v_pages,
            head_dim: self.head_dim,
            dtype: DTYPE,
        };
        // SAFETY: the caller's promise.
        unsafe {
            window_scores(launcher, &self.scores(prompts, choice, workspace))?;
            select_topk(launcher, &self.selection(prompts, choice, workspace))?;
            gather_kv(launcher, &moved)
        }
    }

    fn pool(&self, base: u64) -> Rows {
        Rows::token_major(base, self.page_size, self.kv_heads, self.head_dim)
    }

    fn pages(&self, prompts: &Prompts) -> Pages {
        Pages {
            table: prompts.table,
            table_pages: self.table_pages as i32,
            pages: self.pages as i32,
            page_size: self.page_size as i32,
            reserved: 0,
        }
    }

    /// The queries see keys up to their own, which are the last: no positions are needed.
    fn scores(&self, prompts: &Prompts, choice: &Choice, workspace: Workspace) -> WindowScores {
        let rows = self.score_rows(choice);
        let lse = Lse::token_major(prompts.lse, self.query_heads);
        WindowScores {
            q: Rows::packed(prompts.q, self.query_heads, self.head_dim),
            k: self.pool(prompts.k_pages),
            pages: self.pages(prompts),
            sequences: self.sequences,
            query_heads: self.query_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            dtype: DTYPE,
            queries: Lengths::packed(prompts.cu_seqlens, self.chunk_tokens, self.longest_chunk),
            keys: Lengths::dense(self.longest),
            lengths: prompts.lengths,
            scale: default_scale(self.head_dim),
            lse: Some(Lse { logarithm: Logarithm::Binary, ..lse }),
            scores: Scores {
                base: rows.base,
                sequence_stride: rows.sequence_stride,
                head_stride: rows.head_stride,
                window: Window::Last(WINDOW),
                heads: ScoreHeads::Query,
            },
            workspace: workspace.address,
            workspace_bytes: workspace.bytes,
            ..Default::default()
        }
    }

    fn score_rows(&self, choice: &Choice) -> ScoreRows {
        let head_stride = i64::from(self.longest);
        let sequence_stride = i64::from(self.query_heads) * head_stride;
        ScoreRows { base: choice.scores, sequence_stride, head_stride }
    }

    /// Scores are pooled for each query head, then added over all of them.
    fn selection(&self, prompts: &Prompts, choice: &Choice, workspace: Workspace) -> SelectTopk {
        SelectTopk {
            scores: self.score_rows(choice),
            sequences: self.sequences,
            rows: 1,
            groups: self.kv_heads,
            heads: self.query_heads / self.kv_heads,
            keys: Lengths::dense(self.longest),
            lengths: prompts.lengths,
            window: WINDOW,
            tail: WINDOW,
            pooling: Pooling::max(7),
            page: 1,
            count: self.capacity,
            kept: choice.kept,
            kept_lengths: choice.kept_lengths,
            capacity: self.capacity,
            workspace: workspace.address,
            workspace_bytes: workspace.bytes,
            ..Default::default()
        }
    }
}
