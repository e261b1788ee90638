//! The memory a prompt needs, told before anything is loaded.

use std::fmt;

use serde::Serialize;

use super::EngineError;
use crate::backend::Backend;
use crate::model::LlamaConfig;
use crate::policy::Plan;

/// What a run needs besides its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryOptions {
    /// Bytes of the weights as the backend holds them.
    pub weight_bytes: u64,
    /// [`Backend::chunk_rows`](crate::backend::Backend::chunk_rows).
    pub chunk_rows: usize,
    /// [`Backend::kv_element_bytes`](crate::backend::Backend::kv_element_bytes).
    pub kv_element_bytes: usize,
    /// [`Backend::windows_at_once`](crate::backend::Backend::windows_at_once).
    pub windows_at_once: usize,
    /// Tokens that will follow the prompt: a question and the answer.
    pub more_tokens: usize,
}

impl MemoryOptions {
    /// Those of a run on this backend.
    pub fn new(backend: &impl Backend, weight_bytes: u64, more_tokens: usize) -> Self {
        Self {
            weight_bytes,
            chunk_rows: backend.chunk_rows(),
            kv_element_bytes: backend.kv_element_bytes(),
            windows_at_once: backend.windows_at_once(),
            more_tokens,
        }
    }
}

/// Bytes that reading a prompt and answering it take, each an upper bound. The program itself and what
/// the allocator holds back, some tens of MiB, are not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// The weights.
    #[serde(rename = "weights_bytes")]
    pub weights: u64,
    /// Keys and values of every token in every layer: what there would be without a policy.
    #[serde(rename = "kv_full_bytes")]
    pub kv_full: u64,
    /// Keys and values that stay, with those of the tokens that follow.
    #[serde(rename = "kv_kept_bytes")]
    pub kv_kept: u64,
    /// The most keys and values alive at once.
    #[serde(rename = "kv_peak_bytes")]
    pub kv_peak: u64,
    /// The residual stream and scores, in f32, with what they are made of, and the temporaries of one chunk of rows.
    #[serde(rename = "activations_bytes")]
    pub activations: u64,
}

impl MemoryEstimate {
    /// What running this plan on a model of this configuration takes.
    pub fn new(config: &LlamaConfig, plan: &Plan, options: &MemoryOptions) -> Self {
        Self::together(config, &[plan], options)
    }

    /// What prompts take that are read together: they share the temporaries of a chunk.
    #[must_use]
    pub fn together(config: &LlamaConfig, plans: &[&Plan], options: &MemoryOptions) -> Self {
        let element = options.kv_element_bytes;
        let token = |plan: &Plan| (plan.shape.kv_elements() * element * plan.layers.len()) as u64;
        let more = |plan: &Plan| (options.more_tokens as u64).saturating_mul(token(plan));
        let sum = |bytes: &dyn Fn(&Plan) -> u64| {
            let each = plans.iter().map(|plan| bytes(plan).saturating_add(more(plan)));
            each.fold(0, u64::saturating_add)
        };
        Self {
            weights: options.weight_bytes,
            kv_full: sum(&|plan| plan.prompt_tokens as u64 * token(plan)),
            kv_kept: sum(&|plan| plan.kept_kv_bytes(element) as u64),
            kv_peak: sum(&|plan| plan.peak_kv_bytes(element) as u64),
            activations: plans.iter().map(|plan| of_prompt(config, plan)).sum::<u64>()
                + plans.iter().map(|plan| of_windows(config, plan, options)).max().unwrap_or(0)
                + of_chunk(config, plans, options),
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv_peak).saturating_add(self.activations)
    }

    /// Whether that many bytes are enough.
    ///
    /// # Errors
    /// [`EngineError::TooLarge`] where they are not.
    pub fn check(&self, available: u64) -> Result<(), EngineError> {
        if self.total() <= available {
            Ok(())
        } else {
            Err(EngineError::TooLarge { needed: *self, available })
        }
    }
}

impl fmt::Display for MemoryEstimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} = weights {} + KV cache {} + activations {}",
            Bytes(self.total()),
            Bytes(self.weights),
            Bytes(self.kv_peak),
            Bytes(self.activations)
        )
    }
}

/// A number of bytes for people, such as `1.50 GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        // What two decimals would round up to 1024 belongs to the next unit.
        while value >= 1023.995 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        f.pad(&format!("{value:.2} {}", UNITS[unit]))
    }
}

/// Most bytes of a prompt that live through all chunks and are no keys and values, all f32.
fn of_prompt(config: &LlamaConfig, plan: &Plan) -> u64 {
    let rows = plan.prompt_tokens as u64;
    // Cosines and sines of half a head, and where tokens are selected the narrowed copy beside the stream.
    let candidates = plan.candidates.iter().map(|candidates| candidates.propagate);
    let selected = plan.layers.iter().filter_map(|layer| layer.propagate).chain(candidates);
    let selected = selected.map(|propagate| propagate.count());
    // What is read anew begins beside the stream of the first pass.
    let selected = selected.chain(plan.restart.map(|restart| restart.count)).max().unwrap_or(1) as u64;
    let stream = (rows + selected) * (config.hidden_size + config.head_dim) as u64;
    // A key's probability for every query head, or its product there, and pooled for every kv head and their sum.
    let scored = plan.candidates.is_some()
        || plan.restart.is_some()
        || plan.layers.iter().any(|layer| !layer.windows().is_empty());
    let scores = match scored {
        true => rows * (config.query_heads + config.kv_heads + 1) as u64,
        false => 0,
    };
    // Sums over all queries: those so far, a chunk's, and their total, for two purposes at most.
    let sums = match plan.layers.iter().any(|layer| layer.sums_columns()) {
        true => 6 * rows * config.kv_heads as u64,
        false => 0,
    };
    (stream + scores + sums + config.vocab_size as u64) * size_of::<f32>() as u64
}

/// Most bytes of the probabilities that windows are summed up from, where a backend has them at all. Prompts are scored
/// one by one.
fn of_windows(config: &LlamaConfig, plan: &Plan, options: &MemoryOptions) -> u64 {
    let windows =
        plan.layers.iter().flat_map(|layer| layer.windows().into_iter().map(|window| (window, layer.rows)));
    let last_query = plan.restart.map(|_| (1, plan.prompt_tokens));
    let most = windows.chain(last_query).map(|(window, keys)| window.min(keys) as u64 * keys as u64).max();
    let at_once = options.windows_at_once.min(config.query_heads);
    most.unwrap_or(0) * (at_once * size_of::<f32>()) as u64
}

/// Most bytes of the temporaries of a chunk, which are of the type of keys and values.
fn of_chunk(config: &LlamaConfig, plans: &[&Plan], options: &MemoryOptions) -> u64 {
    let rows = plans.iter().map(|plan| plan.prompt_tokens).sum::<usize>();
    let chunk = rows.min(options.chunk_rows) as u64;
    let hidden = config.hidden_size as u64;
    let queries = (config.query_heads * config.head_dim) as u64;
    let keys = (config.kv_heads * config.head_dim) as u64;
    // The normed rows and the queries live through a chunk; beside them attention has its output twice,
    // in tiles and in rows, and the MLP its input, gate, up and output behind the projected attention.
    let attention = (2 * queries).max(2 * keys);
    let mlp = queries + 3 * hidden + 2 * config.intermediate_size as u64;
    chunk * (hidden + queries + attention.max(mlp)) * options.kv_element_bytes as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{FastKv, GemFilter, ModelShape, Policy, SnapKv};

    fn llama_8b() -> LlamaConfig {
        LlamaConfig::from_json(
            r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                "max_position_embeddings": 131072}"#,
        )
        .expect("valid")
    }

    fn estimate_of(policy: &Policy, windows_at_once: usize, more_tokens: usize) -> MemoryEstimate {
        let config = llama_8b();
        let shape = ModelShape { layers: 32, query_heads: 32, kv_heads: 8, head_dim: 128 };
        let plan = policy.plan(shape, 100_000).expect("valid");
        let options = MemoryOptions {
            weight_bytes: 16 << 30,
            chunk_rows: 1024,
            kv_element_bytes: 2,
            windows_at_once,
            more_tokens,
        };
        MemoryEstimate::new(&config, &plan, &options)
    }

    fn estimate(policy: &Policy, more_tokens: usize) -> MemoryEstimate {
        estimate_of(policy, 0, more_tokens)
    }

    #[test]
    fn probabilities_of_windows_count_once_for_each_thread() {
        let snapkv = Policy::SnapKv(SnapKv::default());
        let activations = |windows_at_once| estimate_of(&snapkv, windows_at_once, 0).activations;
        let window = SnapKv::default().saliency.window as u64 * 100_000 * 4;
        assert_eq!(activations(6) - activations(0), 6 * window);
        // No more than there are query heads.
        assert_eq!(activations(64) - activations(0), 32 * window);
        assert_eq!(estimate_of(&Policy::Full, 64, 0), estimate(&Policy::Full, 0));
    }

    #[test]
    fn a_restart_counts_its_products_and_its_second_stream() {
        let (full, gemfilter) = (Policy::Full, Policy::GemFilter(GemFilter::default()));
        let more = estimate(&gemfilter, 0).activations - estimate(&full, 0).activations;
        let shape = ModelShape { layers: 32, query_heads: 32, kv_heads: 8, head_dim: 128 };
        let count = gemfilter.plan(shape, 100_000).expect("valid").restart.expect("it restarts").count as u64;
        // The last row of the full context goes on alone.
        assert_eq!(more, 4 * (100_000 * (32 + 8 + 1) + (count - 1) * (4096 + 128)));
        let with_products = estimate_of(&gemfilter, 4, 0).activations;
        assert_eq!(with_products - estimate(&gemfilter, 0).activations, 4 * 4 * 100_000);
    }

    #[test]
    fn full_context_keeps_every_key_and_value() {
        let full = estimate(&Policy::Full, 0);
        // 32 layers of K and V of 8 heads of 128 elements of 2 bytes.
        assert_eq!(full.kv_kept, 100_000 * 32 * 2 * 8 * 128 * 2);
        assert_eq!([full.kv_full, full.kv_peak], [full.kv_kept; 2]);
        assert_eq!(estimate(&Policy::Full, 10).kv_peak, full.kv_peak + 10 * 32 * 2 * 8 * 128 * 2);
        // The residual stream alone.
        assert!(full.activations >= 100_000 * 4096 * 4);
        assert!(full.activations < 3 * 100_000 * 4096 * 4);
        assert_eq!(full.total(), full.weights + full.kv_peak + full.activations);
    }

    #[test]
    fn compression_shrinks_the_cache() {
        let full = estimate(&Policy::Full, 0);
        let fastkv = estimate(&Policy::FastKv(FastKv::proportional()), 0);
        assert_eq!(fastkv.kv_full, full.kv_full);
        assert!(fastkv.kv_kept <= full.kv_kept / 10 + 1);
        assert!(fastkv.kv_peak < full.kv_peak / 5, "one layer in full at a time");
    }

    #[test]
    fn prompts_share_the_temporaries_of_a_chunk() {
        let config = llama_8b();
        let shape = ModelShape { layers: 32, query_heads: 32, kv_heads: 8, head_dim: 128 };
        let plan = Policy::Full.plan(shape, 600).expect("valid");
        let activations = |prompts: usize, chunk_rows| {
            let options = MemoryOptions {
                weight_bytes: 0,
                chunk_rows,
                kv_element_bytes: 2,
                windows_at_once: 0,
                more_tokens: 0,
            };
            MemoryEstimate::together(&config, &vec![&plan; prompts], &options).activations
        };
        // Normed rows, queries, attention's output, and in the MLP three times the rows, gate and up.
        let row = 2 * (4096 + 4096 + 4096 + 3 * 4096 + 2 * 14336);
        assert_eq!(activations(1, 600) - activations(1, 100), 500 * row);
        assert_eq!(activations(1, 1000), activations(1, 600), "a prompt is no longer");
        assert_eq!(activations(2, 1000) - activations(2, 600), 400 * row, "together they are");
        assert_eq!(activations(3, 0), 3 * activations(1, 0));
    }

    #[test]
    fn too_large_is_told_with_the_figures() {
        let full = estimate(&Policy::Full, 0);
        assert!(full.check(full.total()).is_ok());
        let error = full.check(8 << 30).expect_err("too large").to_string();
        for figure in ["16.00 GiB", "12.21 GiB", "8.00 GiB"] {
            assert!(error.contains(figure), "{figure} in {error}");
        }
    }

    #[test]
    fn bytes_are_written_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1024 * 1024 - 1, "1.00 MiB"),
            (3 << 29, "1.50 GiB"),
            (5 << 50, "5120.00 TiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
