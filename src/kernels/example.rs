use fastkv::abi::{Cache, Kept, Pages, Pooling, Rows, Slots};
use fastkv::kernels::attention::{PrefillAttention, prefill_attention, prefill_attention_workspace};
use fastkv::kernels::batch::{Lengths, ScoreHeads, ScoreRows, Scores, Window, default_scale};
use fastkv::kernels::decode::{Decode, decode, decode_workspace};
use fastkv::kernels::gather::{GatherKv, GatherRows, gather_kv, gather_rows};
use fastkv::kernels::select::{Reduction, SelectTopk, select_topk, select_topk_workspace};
use fastkv::kernels::{DType, Error, Launcher};

const DTYPE: DType = DType::BF16;
/// Queries at the end of each prompt, by which its keys are scored.
const WINDOW: u32 = 8;

/// A layer, and the largest batch that it is to take: lengths lie on the device and may be less.
#[derive(Clone, Copy)]
pub struct Layer {
    pub query_heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub sequences: u32,
    /// Tokens of all prompts together, and of one.
    pub tokens: u32,
    pub longest: u32,
    /// Keys that a kv head keeps of a prompt, at most.
    pub capacity: u32,
    pub page_size: u32,
    pub pages: u32,
    /// Pages of a kv head of a sequence, at most.
    pub table_pages: u32,
}

/// Device addresses of a prefill.
#[derive(Clone, Copy)]
pub struct Prompts {
    /// `[tokens, query_heads + 2 * kv_heads, head_dim]`, Q and K rotated: one product makes all three.
    pub qkv: u64,
    /// i32 `[sequences + 1]`.
    pub cu_seqlens: u64,
    /// `[tokens, query_heads, head_dim]`.
    pub out: u64,
    /// f32 `[sequences, query_heads, longest]`.
    pub scores: u64,
}

/// Device addresses of a choice of `rows` sets for each sequence: one for each kv head, or one in all.
#[derive(Clone, Copy)]
pub struct Choice {
    pub rows: u32,
    /// i32 `[sequences, rows]`: how many keys to keep, the window's among them.
    pub counts: u64,
    /// i32 `[sequences, rows, capacity]`, and how many these are, `[sequences, rows]`.
    pub kept: u64,
    pub kept_lengths: u64,
}

/// Device addresses of what decoding works on.
#[derive(Clone, Copy)]
pub struct Step {
    /// `[pages, page_size, head_dim]`.
    pub k_pages: u64,
    pub v_pages: u64,
    /// i32 `[sequences, kv_heads, table_pages]`.
    pub table: u64,
    /// i32 `[sequences, kv_heads]`, at first what was kept; every step advances them.
    pub lengths: u64,
    /// `[sequences, query_heads, head_dim]`, as `out` is; K and V of the new token `[sequences, kv_heads, head_dim]`.
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub out: u64,
    /// i32, 0: becomes 1 where a head has no page for the new token.
    pub full: u64,
    /// u32 `[sequences * kv_heads + 1]`, zeros: every step leaves them so.
    pub counters: u64,
}

/// Scratch memory, aligned to 256 bytes. Calls on one stream may share it.
#[derive(Clone, Copy)]
pub struct Workspace {
    pub address: u64,
    pub bytes: usize,
}

impl Layer {
    /// What every call below can do with. Only sizes count here, so addresses may be 0.
    pub fn workspace(
        &self,
        launcher: &impl Launcher,
        prompts: &Prompts,
        choice: &Choice,
        step: &Step,
    ) -> Result<usize, Error> {
        let none = Workspace { address: 0, bytes: 0 };
        let attention = prefill_attention_workspace(&self.attention(prompts, none))?;
        let selection = select_topk_workspace(launcher, &self.selection(prompts, choice, none))?;
        Ok(attention.max(selection).max(decode_workspace(&self.decoding(step, none))?))
    }

    /// Attention of all prompts and scores of their keys, one launch.
    ///
    /// # Safety
    /// Every address holds what is said of it until the work is done, and nobody else touches what is written.
    pub unsafe fn attend(
        &self,
        launcher: &impl Launcher,
        prompts: &Prompts,
        workspace: Workspace,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { prefill_attention(launcher, &self.attention(prompts, workspace)) }
    }

    /// What every kv head keeps, moved to its pages. `slots`, i64 `[sequences, kv_heads, capacity]`, says where each kept
    /// key goes: page x page size + place in it; -1 is nowhere.
    ///
    /// # Safety
    /// As for [`attend`](Self::attend).
    pub unsafe fn compress(
        &self,
        launcher: &impl Launcher,
        prompts: &Prompts,
        choice: &Choice,
        step: &Step,
        slots: u64,
        workspace: Workspace,
    ) -> Result<(), Error> {
        let [_, k, v] = self.qkv(prompts);
        let width = i64::from(self.head_dim);
        let moved = GatherKv {
            kept: self.kept(prompts, choice),
            k,
            v,
            slots: Slots {
                slots,
                page_stride: i64::from(self.page_size) * width,
                // A page belongs to one head.
                head_stride: 0,
                slot_stride: width,
                pages: self.pages as i32,
                page_size: self.page_size as i32,
            },
            k_out: step.k_pages,
            v_out: step.v_pages,
            head_dim: self.head_dim,
            dtype: DTYPE,
            ..Default::default()
        };
        // SAFETY: the caller's promise.
        unsafe {
            select_topk(launcher, &self.selection(prompts, choice, workspace))?;
            gather_kv(launcher, &moved)
        }
    }

    /// At the TSP layer: one set of tokens for each sequence, and their hidden states, f32 `[tokens, width]`, packed at
    /// the rows that `starts`, i64 `[sequences]`, says. Later layers rotate by the `positions`, i32, that come along.
    /// Their `cu_seqlens`, and `starts`, are sums of what the sequences before keep, `min(count, tokens)` each, which
    /// the host knows where it chose the counts.
    ///
    /// # Safety
    /// As for [`attend`](Self::attend).
    pub unsafe fn hand_on(
        &self,
        launcher: &impl Launcher,
        prompts: &Prompts,
        choice: &Choice,
        [hidden, starts, out, positions]: [u64; 4],
        width: u32,
        workspace: Workspace,
    ) -> Result<(), Error> {
        let moved = GatherRows {
            kept: Kept { starts, positions_out: positions, ..self.kept(prompts, choice) },
            rows: Rows::packed(hidden, 1, width),
            out,
            width,
            dtype: DType::F32,
        };
        // SAFETY: the caller's promise.
        unsafe {
            select_topk(launcher, &self.selection(prompts, choice, workspace))?;
            gather_rows(launcher, &moved)
        }
    }

    /// Attention of the next token of each sequence, which is appended. Can be captured in a graph, which then serves
    /// every step: lengths and table are data.
    ///
    /// # Safety
    /// As for [`attend`](Self::attend).
    pub unsafe fn decode(
        &self,
        launcher: &impl Launcher,
        step: &Step,
        workspace: Workspace,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { decode(launcher, &self.decoding(step, workspace)) }
    }

    /// Views of the packed tensor: addresses are bytes, strides are elements.
    fn qkv(&self, prompts: &Prompts) -> [Rows; 3] {
        let head_bytes = self.head_dim * DTYPE.bytes();
        [0, self.query_heads, self.query_heads + self.kv_heads].map(|first| Rows {
            base: prompts.qkv + u64::from(first) * u64::from(head_bytes),
            sequence_stride: 0,
            head_stride: self.head_dim.into(),
            token_stride: i64::from(self.query_heads + 2 * self.kv_heads) * i64::from(self.head_dim),
        })
    }

    fn attention(&self, prompts: &Prompts, workspace: Workspace) -> PrefillAttention {
        let [q, k, v] = self.qkv(prompts);
        let lengths = Lengths::packed(prompts.cu_seqlens, self.tokens, self.longest);
        let scores = self.score_rows(prompts);
        PrefillAttention {
            q,
            k,
            v,
            out: Rows::packed(prompts.out, self.query_heads, self.head_dim),
            sequences: self.sequences,
            query_heads: self.query_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            dtype: DTYPE,
            queries: lengths,
            keys: lengths,
            scale: default_scale(self.head_dim),
            scores: Some(Scores {
                base: scores.base,
                sequence_stride: scores.sequence_stride,
                head_stride: scores.head_stride,
                window: Window::Last(WINDOW),
                heads: ScoreHeads::Query,
            }),
            workspace: workspace.address,
            workspace_bytes: workspace.bytes,
            ..Default::default()
        }
    }

    fn score_rows(&self, prompts: &Prompts) -> ScoreRows {
        let head_stride = i64::from(self.longest);
        let sequence_stride = i64::from(self.query_heads) * head_stride;
        ScoreRows { base: prompts.scores, sequence_stride, head_stride }
    }

    /// Scores are pooled for each query head, then added over the heads of a row.
    fn selection(&self, prompts: &Prompts, choice: &Choice, workspace: Workspace) -> SelectTopk {
        SelectTopk {
            scores: self.score_rows(prompts),
            sequences: self.sequences,
            rows: choice.rows,
            groups: self.kv_heads / choice.rows,
            heads: self.query_heads / self.kv_heads,
            keys: Lengths::packed(prompts.cu_seqlens, self.tokens, self.longest),
            window: WINDOW,
            tail: WINDOW,
            pooling: Pooling::max(7),
            reduction: Reduction::Sum,
            page: 1,
            count: self.capacity,
            counts: choice.counts,
            kept: choice.kept,
            kept_lengths: choice.kept_lengths,
            capacity: self.capacity,
            workspace: workspace.address,
            workspace_bytes: workspace.bytes,
            ..Default::default()
        }
    }

    fn kept(&self, prompts: &Prompts, choice: &Choice) -> Kept {
        Kept {
            indices: choice.kept,
            index_sequence_stride: i64::from(choice.rows) * i64::from(self.capacity),
            index_head_stride: self.capacity.into(),
            lengths: choice.kept_lengths,
            cu_seqlens: prompts.cu_seqlens,
            out_rows: i64::from(self.sequences) * i64::from(choice.rows) * i64::from(self.capacity),
            sequences: self.sequences as i32,
            heads: choice.rows as i32,
            tokens: self.tokens as i32,
            capacity: self.capacity as i32,
            ..Kept::default()
        }
    }

    /// The heads of a sequence share pages and length in a paged cache. Here each keeps as much as it needs, so that each
    /// is a sequence of one kv head to the kernel.
    fn decoding(&self, step: &Step, workspace: Workspace) -> Decode {
        let width = i64::from(self.head_dim);
        let pages = |base| Rows {
            base,
            sequence_stride: i64::from(self.page_size) * width,
            head_stride: 0,
            token_stride: width,
        };
        let group = self.query_heads / self.kv_heads;
        Decode {
            cache: Cache {
                k: pages(step.k_pages),
                v: pages(step.v_pages),
                lengths: step.lengths,
                pages: Pages {
                    table: step.table,
                    table_pages: self.table_pages as i32,
                    pages: self.pages as i32,
                    page_size: self.page_size as i32,
                    reserved: 0,
                },
                capacity: (self.table_pages * self.page_size) as i32,
                sequences: (self.sequences * self.kv_heads) as i32,
                heads: 1,
                ..Cache::default()
            },
            q: Rows::token_major(step.q, 1, group, self.head_dim),
            k_new: Rows::token_major(step.k, 1, 1, self.head_dim),
            v_new: Rows::token_major(step.v, 1, 1, self.head_dim),
            out: Rows::token_major(step.out, 1, group, self.head_dim),
            full: step.full,
            scale: default_scale(self.head_dim),
            query_heads: group,
            tokens: 1,
            head_dim: self.head_dim,
            dtype: DTYPE,
            counters: step.counters,
            workspace: workspace.address,
            workspace_bytes: workspace.bytes,
            ..Default::default()
        }
    }
}
