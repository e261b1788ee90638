//! A Llama decoder on a backend: the steps of a layer, for any rows of the residual stream.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::ops::Range;

use super::EngineError;
use crate::backend::Backend;
use crate::model::{LlamaConfig, ModelDir};
use crate::policy::ModelShape;

/// The weights of a model.
#[derive(Debug)]
pub(super) struct Llama<B: Backend> {
    pub(super) config: LlamaConfig,
    pub(super) embedding: B::Weight,
    pub(super) layers: Vec<Layer<B>>,
    norm: B::Weight,
    /// The embedding where there is none.
    lm_head: Option<B::Weight>,
}

/// The weights of a decoder layer.
#[derive(Debug)]
pub(super) struct Layer<B: Backend> {
    input_norm: B::Weight,
    q: Linear<B>,
    k: Linear<B>,
    v: Linear<B>,
    o: Linear<B>,
    post_attention_norm: B::Weight,
    gate: Linear<B>,
    up: Linear<B>,
    down: Linear<B>,
}

/// Where rows stand in the sequence.
#[derive(Debug)]
pub(super) struct Places<B: Backend> {
    /// Their original positions.
    pub(super) positions: B::Indices,
    /// The rotary angles of those.
    angles: B::Rotary,
}

/// Some rows, among all whose places are known.
#[derive(Debug)]
pub(super) struct Span<'a, B: Backend> {
    pub(super) positions: &'a B::Indices,
    pub(super) angles: &'a B::Rotary,
    pub(super) rows: Range<usize>,
}

impl<B: Backend> Clone for Span<'_, B> {
    fn clone(&self) -> Self {
        Self { rows: self.rows.clone(), ..*self }
    }
}

impl<B: Backend> Places<B> {
    pub(super) fn span(&self, rows: Range<usize>) -> Span<'_, B> {
        Span { positions: &self.positions, angles: &self.angles, rows }
    }
}

/// Rows of a sequence on their way through a layer.
#[derive(Debug)]
pub(super) struct Part<'a, B: Backend> {
    /// The residual stream that they are rows of.
    pub(super) hidden: &'a mut B::Tensor,
    pub(super) span: Span<'a, B>,
}

/// What attention reads of some rows; queries and keys are rotated.
#[derive(Debug)]
pub(super) struct Projected<B: Backend> {
    pub(super) queries: B::Tensor,
    pub(super) keys: B::Tensor,
    pub(super) values: B::Tensor,
}

#[derive(Debug)]
struct Linear<B: Backend> {
    weight: B::Weight,
    bias: Option<B::Weight>,
}

impl<B: Backend> Llama<B> {
    /// `progress` is told of the stored bytes so far, and of how many there are.
    pub(super) fn load(
        backend: &B,
        model: &ModelDir,
        mut progress: impl FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Self, EngineError> {
        let weights = &model.weights;
        let stored: HashMap<_, _> = weights.tensors().map(|tensor| (tensor.name(), tensor)).collect();
        let (mut done, total) = (0, weights.total_bytes());
        Self::new(model.config.clone(), weights.tied, |name, _| {
            let stored = stored[name];
            let weight = backend.weight(stored)?;
            done += stored.bytes().len() as u64;
            match progress(done, total) {
                ControlFlow::Continue(()) => Ok(weight),
                ControlFlow::Break(()) => Err(EngineError::Cancelled),
            }
        })
    }

    /// Weights by the names that Hugging Face gives them, each of the shape that is told. Where the output projection
    /// is the embedding (`tied`), it is not asked for.
    pub(super) fn new(
        config: LlamaConfig,
        tied: bool,
        mut weight: impl FnMut(&str, &[usize]) -> Result<B::Weight, EngineError>,
    ) -> Result<Self, EngineError> {
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        Ok(Self {
            embedding: weight("model.embed_tokens.weight", &[vocabulary, hidden])?,
            layers: (0..config.num_layers)
                .map(|layer| Layer::new(&config, layer, &mut weight))
                .collect::<Result<_, _>>()?,
            norm: weight("model.norm.weight", &[hidden])?,
            lm_head: match tied {
                true => None,
                false => Some(weight("lm_head.weight", &[vocabulary, hidden])?),
            },
            config,
        })
    }

    pub(super) fn shape(&self) -> ModelShape {
        ModelShape::from(&self.config)
    }

    /// The places of rows at these positions, in a sequence that has `length` tokens so far.
    pub(super) fn places(
        &self,
        backend: &B,
        positions: B::Indices,
        length: usize,
    ) -> Result<Places<B>, EngineError> {
        let frequencies = self.config.rope.inverse_frequencies(self.config.head_dim, length);
        Ok(Places { angles: backend.rotary(&frequencies, &positions)?, positions })
    }

    /// Next-token logits behind the last row of each residual stream.
    pub(super) fn logits(&self, backend: &B, hidden: &[&B::Tensor]) -> Result<Vec<Vec<f32>>, EngineError> {
        let last = |hidden: &&B::Tensor| backend.last_rows(hidden, 1);
        let last = joined(backend, hidden.iter().map(last).collect::<Result<_, _>>()?)?;
        self.read_logits(backend, &self.logits_of(backend, &last)?)
    }

    /// Next-token logits behind every row of a residual stream.
    pub(super) fn logits_of(&self, backend: &B, hidden: &B::Tensor) -> Result<B::Tensor, EngineError> {
        let rows = backend.rows(hidden);
        let normed = backend.rms_norm(hidden, 0..rows, &self.norm, self.config.rms_norm_eps)?;
        Ok(backend.logits(&normed, self.lm_head.as_ref().unwrap_or(&self.embedding))?)
    }

    /// Row by row. Waits for the device.
    pub(super) fn read_logits(&self, backend: &B, logits: &B::Tensor) -> Result<Vec<Vec<f32>>, EngineError> {
        let rows = backend.read(logits)?;
        let rows: Vec<Vec<f32>> = rows.chunks(self.config.vocab_size).map(<[f32]>::to_vec).collect();
        rows.iter().try_for_each(|logits| self.check_logits(logits))?;
        Ok(rows)
    }

    /// There is a number for every token.
    pub(super) fn check_logits(&self, logits: &[f32]) -> Result<(), EngineError> {
        let vocabulary = self.config.vocab_size;
        if logits.len() != vocabulary {
            return Err(EngineError::WrongLogits { logits: logits.len(), vocabulary });
        }
        match logits.iter().position(|logit| !logit.is_finite()) {
            Some(token) => Err(EngineError::NotFinite { value: logits[token], token }),
            None => Ok(()),
        }
    }
}

impl<B: Backend> Layer<B> {
    fn new(
        config: &LlamaConfig,
        layer: usize,
        weight: &mut impl FnMut(&str, &[usize]) -> Result<B::Weight, EngineError>,
    ) -> Result<Self, EngineError> {
        let &LlamaConfig { hidden_size: hidden, intermediate_size: inner, .. } = config;
        let (queries, keys) = (config.query_heads * config.head_dim, config.kv_heads * config.head_dim);
        let of_layer = |name: &str| format!("model.layers.{layer}.{name}");
        let mut linear = |name: &str, shape: [usize; 2], bias: bool| -> Result<Linear<B>, EngineError> {
            Ok(Linear {
                weight: weight(&of_layer(&format!("{name}.weight")), &shape)?,
                bias: bias.then(|| weight(&of_layer(&format!("{name}.bias")), &shape[..1])).transpose()?,
            })
        };
        let (attention, mlp) = (config.attention_bias, config.mlp_bias);
        Ok(Self {
            q: linear("self_attn.q_proj", [queries, hidden], attention)?,
            k: linear("self_attn.k_proj", [keys, hidden], attention)?,
            v: linear("self_attn.v_proj", [keys, hidden], attention)?,
            o: linear("self_attn.o_proj", [hidden, queries], attention)?,
            gate: linear("mlp.gate_proj", [inner, hidden], mlp)?,
            up: linear("mlp.up_proj", [inner, hidden], mlp)?,
            down: linear("mlp.down_proj", [hidden, inner], mlp)?,
            input_norm: weight(&of_layer("input_layernorm.weight"), &[hidden])?,
            post_attention_norm: weight(&of_layer("post_attention_layernorm.weight"), &[hidden])?,
        })
    }

    /// The whole layer for some rows of each sequence. `attend` is given the number of a part, its rotated
    /// queries and keys, and its values.
    pub(super) fn read(
        &self,
        backend: &B,
        config: &LlamaConfig,
        parts: &mut [Part<'_, B>],
        mut attend: impl FnMut(usize, &Span<'_, B>, Projected<B>) -> Result<B::Tensor, EngineError>,
    ) -> Result<(), EngineError> {
        let normed = self.attention_input(backend, config, parts)?;
        let spans: Vec<Span<'_, B>> = parts.iter().map(|part| part.span.clone()).collect();
        let [keys, values] = self.keys_values(backend, &normed, &spans)?;
        let queries = self.queries(backend, &normed, &spans)?;
        let projected = queries.into_iter().zip(keys).zip(values);
        let projected = projected.map(|((queries, keys), values)| Projected { queries, keys, values });
        let attended = projected.zip(&spans).enumerate();
        let attended = attended.map(|(part, (projected, span))| attend(part, span, projected));
        let attended = attended.collect::<Result<_, _>>()?;
        self.finish(backend, config, parts, attended)
    }

    /// The normed rows of all parts that projections read.
    pub(super) fn attention_input(
        &self,
        backend: &B,
        config: &LlamaConfig,
        parts: &[Part<'_, B>],
    ) -> Result<B::Tensor, EngineError> {
        normed(backend, config, parts, &self.input_norm)
    }

    /// Rotated queries of normed rows, span by span.
    pub(super) fn queries(
        &self,
        backend: &B,
        normed: &B::Tensor,
        spans: &[Span<'_, B>],
    ) -> Result<Vec<B::Tensor>, EngineError> {
        rotated(backend, self.q.apply(backend, normed)?, spans)
    }

    /// Rotated keys, and values, of normed rows, span by span.
    pub(super) fn keys_values(
        &self,
        backend: &B,
        normed: &B::Tensor,
        spans: &[Span<'_, B>],
    ) -> Result<[Vec<B::Tensor>; 2], EngineError> {
        let keys = rotated(backend, self.k.apply(backend, normed)?, spans)?;
        Ok([keys, split(backend, self.v.apply(backend, normed)?, spans)?])
    }

    /// What follows attention: output projection, MLP, and both residual sums.
    pub(super) fn finish(
        &self,
        backend: &B,
        config: &LlamaConfig,
        parts: &mut [Part<'_, B>],
        attended: Vec<B::Tensor>,
    ) -> Result<(), EngineError> {
        let attended = joined(backend, attended)?;
        let projected = self.o.apply(backend, &attended)?;
        let normed = add_normed(backend, config, parts, projected, &self.post_attention_norm)?;
        let gate = self.gate.apply(backend, &normed)?;
        let up = self.up.apply(backend, &normed)?;
        add(backend, parts, self.down.apply(backend, &backend.swiglu(gate, &up)?)?)
    }
}

// Products take the rows of all sequences at once; all else goes sequence by sequence.

fn normed<B: Backend>(
    backend: &B,
    config: &LlamaConfig,
    parts: &[Part<'_, B>],
    weight: &B::Weight,
) -> Result<B::Tensor, EngineError> {
    let norm = |part: &Part<'_, B>| {
        backend.rms_norm(part.hidden, part.span.rows.clone(), weight, config.rms_norm_eps)
    };
    joined(backend, parts.iter().map(norm).collect::<Result<_, _>>()?)
}

fn rotated<B: Backend>(
    backend: &B,
    x: B::Tensor,
    spans: &[Span<'_, B>],
) -> Result<Vec<B::Tensor>, EngineError> {
    let mut each = split(backend, x, spans)?;
    for (x, span) in each.iter_mut().zip(spans) {
        backend.rotate(x, span.angles, span.rows.start)?;
    }
    Ok(each)
}

/// Adds rows to the residual streams that they belong to.
fn add<B: Backend>(backend: &B, parts: &mut [Part<'_, B>], x: B::Tensor) -> Result<(), EngineError> {
    let spans: Vec<Span<'_, B>> = parts.iter().map(|part| part.span.clone()).collect();
    for (part, x) in parts.iter_mut().zip(split(backend, x, &spans)?) {
        backend.add(part.hidden, part.span.rows.start, &x)?;
    }
    Ok(())
}

/// The same, and the normed rows of all streams that this gives.
fn add_normed<B: Backend>(
    backend: &B,
    config: &LlamaConfig,
    parts: &mut [Part<'_, B>],
    x: B::Tensor,
    weight: &B::Weight,
) -> Result<B::Tensor, EngineError> {
    let spans: Vec<Span<'_, B>> = parts.iter().map(|part| part.span.clone()).collect();
    let mut all = Vec::with_capacity(parts.len());
    for (part, x) in parts.iter_mut().zip(split(backend, x, &spans)?) {
        let first = part.span.rows.start;
        all.push(backend.add_norm(part.hidden, first, &x, weight, config.rms_norm_eps)?);
    }
    joined(backend, all)
}

fn joined<B: Backend>(backend: &B, mut parts: Vec<B::Tensor>) -> Result<B::Tensor, EngineError> {
    match parts.len() {
        1 => Ok(parts.remove(0)),
        _ => Ok(backend.concat_rows(&parts.iter().collect::<Vec<_>>())?),
    }
}

fn split<B: Backend>(
    backend: &B,
    x: B::Tensor,
    spans: &[Span<'_, B>],
) -> Result<Vec<B::Tensor>, EngineError> {
    if spans.len() == 1 {
        return Ok(vec![x]);
    }
    let mut first = 0;
    let mut slice = |span: &Span<'_, B>| {
        first += span.rows.len();
        Ok(backend.slice_rows(&x, first - span.rows.len()..first)?)
    };
    spans.iter().map(&mut slice).collect()
}

impl<B: Backend> Linear<B> {
    fn apply(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, EngineError> {
        Ok(backend.linear(x, &self.weight, self.bias.as_ref())?)
    }
}

impl From<&LlamaConfig> for ModelShape {
    fn from(config: &LlamaConfig) -> Self {
        Self {
            layers: config.num_layers,
            query_heads: config.query_heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        }
    }
}

/// Whether a model can read tokens whose first one stands at this position: what a prefill or an append
/// would find out after loading.
///
/// # Errors
/// No tokens, an id outside the vocabulary, or more tokens than the model's context takes.
pub fn check_tokens(config: &LlamaConfig, ids: &[u32], first: usize) -> Result<(), EngineError> {
    if ids.is_empty() {
        return Err(EngineError::NoTokens);
    }
    let vocabulary = config.vocab_size;
    if let Some(index) = ids.iter().position(|id| *id as usize >= vocabulary) {
        return Err(EngineError::TokenOutOfRange { id: ids[index], position: first + index, vocabulary });
    }
    let tokens = first + ids.len();
    let limit = config.context_limit();
    if tokens > limit.tokens {
        return Err(EngineError::ContextExceeded { tokens, limit: limit.tokens, reason: limit.reason });
    }
    Ok(())
}

/// The numbers of the sequences that take part in a pass through a layer, which ascend, and their rows.
pub(super) type Pass = Vec<(usize, Range<usize>)>;

/// Passes of at most `chunk` rows that sequences of these lengths share. Each sequence is cut as it would be alone.
pub(super) fn passes(lengths: &[usize], chunk: usize) -> Vec<Pass> {
    let cut: Vec<Vec<Range<usize>>> = lengths.iter().map(|rows| chunks(*rows, chunk).collect()).collect();
    let rounds = cut.iter().map(Vec::len).max().unwrap_or(0);
    let mut passes: Vec<Pass> = Vec::new();
    for round in 0..rounds {
        let mut room = 0;
        for (sequence, cut) in cut.iter().enumerate() {
            let Some(rows) = cut.get(round) else { continue };
            match passes.last_mut() {
                Some(pass) if rows.len() <= room => pass.push((sequence, rows.clone())),
                _ => {
                    passes.push(vec![(sequence, rows.clone())]);
                    room = chunk;
                }
            }
            room -= rows.len();
        }
    }
    passes
}

/// Row ranges of at most `chunk` rows; the last one is full, so that it holds the whole window.
pub(super) fn chunks(rows: usize, chunk: usize) -> impl Iterator<Item = Range<usize>> {
    let first = match rows % chunk {
        0 => chunk.min(rows),
        remainder => remainder,
    };
    (first..=rows).step_by(chunk).map(move |end| end.saturating_sub(chunk)..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_share_passes_and_are_cut_as_if_alone() {
        for lengths in [&[][..], &[5], &[64, 64], &[1, 2, 3], &[200, 10, 64, 65, 130, 7], &[63, 1, 63, 1]] {
            let passes = passes(lengths, 64);
            for (sequence, rows) in lengths.iter().enumerate() {
                let own = passes.iter().flatten().filter(|(number, _)| *number == sequence);
                let own: Vec<_> = own.map(|(_, rows)| rows.clone()).collect();
                assert_eq!(own, chunks(*rows, 64).collect::<Vec<_>>(), "{lengths:?}");
            }
            for pass in &passes {
                assert!(pass.iter().map(|(_, rows)| rows.len()).sum::<usize>() <= 64, "{lengths:?}");
                assert!(pass.is_sorted_by(|a, b| a.0 < b.0), "{lengths:?}");
            }
        }
        assert_eq!(passes(&[10, 20, 30, 5], 64).len(), 2, "short ones go together");
    }
}
