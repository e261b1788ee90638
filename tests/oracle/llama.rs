//! A Llama forward from raw weights, FastKV's prefill by its nine steps with nothing left out, and
//! decoding over the compacted cache.

use std::collections::HashMap;
use std::f64::consts::PI;
use std::path::Path;

use serde_json::Value;

use super::checkpoint::{self, Stored};
use super::plan::{Keep, Layer as Rules};
use super::policies::{self, Classes};
use super::{
    Matrix, Pool, attend, biased_probabilities, dot, linear, margin, pool, rms_norm, rope, sum_lists, swiglu,
    top, weighted,
};

/// A model's numbers.
pub(crate) struct Model {
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Vec<f64>,
    lm_head: Matrix,
    epsilon: f64,
    pub(crate) query_heads: usize,
    pub(crate) kv_heads: usize,
    head_dim: usize,
    rope: Rope,
}

struct Layer {
    input_norm: Vec<f64>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    post_attention_norm: Vec<f64>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

struct Linear {
    weight: Matrix,
    bias: Option<Vec<f64>>,
}

/// How positions become angles.
pub(crate) struct Rope {
    pub(crate) theta: f64,
    pub(crate) scaling: Scaling,
}

pub(crate) enum Scaling {
    None,
    Linear { factor: f64 },
    Dynamic { factor: f64, trained: f64 },
    Llama3 { factor: f64, low: f64, high: f64, trained: f64 },
}

/// How tokens are scored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Observation {
    pub(crate) window: usize,
    pub(crate) kind: Pool,
    pub(crate) kernel: usize,
}

/// One cached token of one kv head.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) position: usize,
    key: Vec<f64>,
    value: Vec<f64>,
    /// Attention it has had, from the group of its head.
    sum: f64,
}

/// What a prefill did in one layer.
#[derive(Debug)]
pub(crate) struct LayerRun {
    /// Original positions of the tokens it read.
    pub(crate) read: Vec<usize>,
    /// Its cache, for each kv head.
    pub(crate) cache: Vec<Vec<Entry>>,
    /// Original positions that go on, where not all do.
    pub(crate) hands_on: Option<Vec<usize>>,
    /// Share of the window's attention on kept tokens, for each kv head.
    pub(crate) mass: Vec<f64>,
    /// How near its choices were; see [`margin`].
    pub(crate) margin: f64,
    keep: Keep,
    /// FastGen's set of each kv head.
    pub(crate) sets: Vec<usize>,
    /// The attention that its sets recover, for each kv head.
    pub(crate) recovered: Vec<f64>,
}

/// A sequence.
pub(crate) struct Sequence<'a> {
    model: &'a Model,
    /// Tokens of the prompt.
    prompt: usize,
    pub(crate) tokens: usize,
    pub(crate) layers: Vec<LayerRun>,
    pub(crate) logits: Vec<f64>,
    /// Tokens of the prompt that were read anew.
    pub(crate) restarted: Option<Vec<usize>>,
    ids: Vec<u32>,
    steering: Option<Steering>,
    classes: Classes,
}

/// What a prefill is to do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Orders {
    pub(crate) rules: Vec<Rules>,
    /// How tokens are scored that caches keep.
    pub(crate) keeps_by: Option<Observation>,
    /// How tokens are scored that go on.
    pub(crate) hands_on_by: Option<Observation>,
    /// Positions that chosen caches keep where nothing scores them.
    pub(crate) given: Option<Vec<Vec<Vec<u32>>>>,
    /// GemFilter's layer, count and kernel.
    pub(crate) restart: Option<(usize, usize, usize)>,
    pub(crate) classes: Classes,
    pub(crate) steering: Option<Steering>,
}

impl Orders {
    /// As many tokens more in caches as are highlighted, and room for them among what goes on.
    pub(crate) fn steer(&mut self, n: usize, highlighted: usize) {
        let mut rows = n;
        if let Some((_, count, _)) = &mut self.restart {
            *count = (*count).max(highlighted);
            rows = *count;
        }
        for rules in &mut self.rules {
            rules.rows = rows;
            match &mut rules.keep {
                Keep::Chosen(count) | Keep::Shared(count, _) => *count = rows.min(*count + highlighted),
                Keep::Each(counts) => {
                    counts.iter_mut().for_each(|count| *count = rows.min(*count + highlighted))
                }
                Keep::Heavy(count, _) => *count += highlighted,
                Keep::All | Keep::Ends(..) | Keep::Recovered(..) => {}
            }
            if let Some(count) = &mut rules.hands_on {
                let newest =
                    rules.recent.unwrap_or(self.hands_on_by.map_or(0, |observation| observation.window));
                // PyramidInfer's sinks come before what is highlighted.
                let sinks = if rules.recent.is_some() { 4 } else { 0 };
                *count = (*count).max((newest + sinks + highlighted).min(rows));
                rows = *count;
            }
        }
    }
}

/// PASTA.
#[derive(Clone, Debug)]
pub(crate) struct Steering {
    pub(crate) alpha: f64,
    pub(crate) heads: Vec<(usize, usize)>,
    /// By token of the prompt.
    pub(crate) highlighted: Vec<bool>,
}

impl Steering {
    fn is_highlighted(&self, position: usize) -> bool {
        position < self.highlighted.len() && self.highlighted[position]
    }

    fn bias(&self, layer: usize, head: usize, position: usize) -> f64 {
        let muted = position < self.highlighted.len() && !self.highlighted[position];
        if muted && self.heads.contains(&(layer, head)) { self.alpha.ln() } else { 0.0 }
    }
}

impl Rope {
    /// `theta^(−2i/d)`, stretched; a float32 buffer in every implementation, so rounded once.
    pub(crate) fn inverse_frequencies(&self, head_dim: usize, sequence_length: usize) -> Vec<f64> {
        let d = head_dim as f64;
        let mut theta = self.theta;
        if let Scaling::Dynamic { factor, trained } = self.scaling
            && sequence_length as f64 > trained
        {
            let stretch = factor * sequence_length as f64 / trained - (factor - 1.0);
            theta *= stretch.powf(d / (d - 2.0));
        }
        let mut frequencies = Vec::new();
        for i in 0..head_dim / 2 {
            let plain = theta.powf(-2.0 * i as f64 / d);
            let stretched = match self.scaling {
                Scaling::None | Scaling::Dynamic { .. } => plain,
                Scaling::Linear { factor } => plain / factor,
                Scaling::Llama3 { factor, low, high, trained } => {
                    let wavelength = 2.0 * PI / plain;
                    if wavelength > trained / low {
                        plain / factor
                    } else if wavelength < trained / high {
                        plain
                    } else {
                        let smooth = (trained / wavelength - low) / (high - low);
                        (1.0 - smooth) * plain / factor + smooth * plain
                    }
                }
            };
            frequencies.push(f64::from(stretched as f32));
        }
        frequencies
    }

    fn read(config: &Value) -> Self {
        let parameters = [&config["rope_scaling"], &config["rope_parameters"]];
        let parameters = parameters.into_iter().find(|value| value.is_object()).unwrap_or(&Value::Null);
        let number = |field: &str| parameters[field].as_f64();
        let theta = number("rope_theta").or(config["rope_theta"].as_f64()).unwrap_or(10_000.0);
        let trained = config["max_position_embeddings"].as_f64().expect("a context");
        let kind = parameters["rope_type"].as_str().or(parameters["type"].as_str()).unwrap_or("default");
        let factor = || number("factor").expect("a factor");
        let scaling = match kind {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: factor() },
            "dynamic" => Scaling::Dynamic { factor: factor(), trained },
            "llama3" => Scaling::Llama3 {
                factor: factor(),
                low: number("low_freq_factor").expect("a factor"),
                high: number("high_freq_factor").expect("a factor"),
                trained: number("original_max_position_embeddings").expect("a context"),
            },
            other => panic!("rope type {other}"),
        };
        Self { theta, scaling }
    }
}

impl Linear {
    fn read(tensors: &HashMap<String, Stored>, module: &str) -> Self {
        let bias = tensors.get(&format!("{module}.bias")).map(|bias| bias.data.clone());
        Self { weight: matrix(&tensors[&format!("{module}.weight")]), bias }
    }

    fn apply(&self, rows: &Matrix) -> Matrix {
        rows.iter().map(|row| linear(row, &self.weight, self.bias.as_deref())).collect()
    }
}

fn matrix(stored: &Stored) -> Matrix {
    stored.data.chunks(stored.shape[1]).map(<[f64]>::to_vec).collect()
}

impl Model {
    /// Reads `config.json` and the safetensors files beside it.
    pub(crate) fn open(directory: &Path) -> Self {
        let config = checkpoint::json(&directory.join("config.json"));
        let tensors = checkpoint::tensors(directory);
        let count = |field: &str| config[field].as_u64().map(|number| number as usize);
        let query_heads = count("num_attention_heads").expect("heads");
        let hidden = count("hidden_size").expect("a width");
        let vector = |name: &str| tensors[name].data.clone();
        let layers = (0..count("num_hidden_layers").expect("layers"))
            .map(|layer| {
                let linear =
                    |name: &str| Linear::read(&tensors, &format!("model.layers.{layer}.{name}_proj"));
                let norm = |name: &str| vector(&format!("model.layers.{layer}.{name}_layernorm.weight"));
                Layer {
                    input_norm: norm("input"),
                    q: linear("self_attn.q"),
                    k: linear("self_attn.k"),
                    v: linear("self_attn.v"),
                    o: linear("self_attn.o"),
                    post_attention_norm: norm("post_attention"),
                    gate: linear("mlp.gate"),
                    up: linear("mlp.up"),
                    down: linear("mlp.down"),
                }
            })
            .collect();
        let embedding = matrix(&tensors["model.embed_tokens.weight"]);
        Self {
            lm_head: tensors.get("lm_head.weight").map_or_else(|| embedding.clone(), matrix),
            embedding,
            layers,
            norm: vector("model.norm.weight"),
            epsilon: config["rms_norm_eps"].as_f64().expect("an epsilon"),
            query_heads,
            kv_heads: count("num_key_value_heads").unwrap_or(query_heads),
            head_dim: count("head_dim").unwrap_or(hidden / query_heads),
            rope: Rope::read(&config),
        }
    }

    fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    fn norm(&self, rows: &Matrix, weight: &[f64]) -> Matrix {
        rows.iter().map(|row| rms_norm(row, weight, self.epsilon)).collect()
    }

    /// The rows of each head, rotated where frequencies are given: `[head][row]`.
    fn heads(&self, rows: &Matrix, positions: &[usize], frequencies: Option<&[f64]>) -> Vec<Matrix> {
        let heads = rows[0].len() / self.head_dim;
        let of_row = |head: usize, row: usize| {
            let part = &rows[row][head * self.head_dim..(head + 1) * self.head_dim];
            frequencies.map_or_else(|| part.to_vec(), |f| rope(part, positions[row], f))
        };
        (0..heads).map(|head| (0..rows.len()).map(|row| of_row(head, row)).collect()).collect()
    }

    /// Output projection, MLP and both residual sums; `attended` is `[head][row]`.
    fn finish(&self, layer: &Layer, hidden: &mut Matrix, attended: &[Matrix]) {
        let joined: Matrix = (0..hidden.len())
            .map(|row| attended.iter().flat_map(|head| head[row].clone()).collect())
            .collect();
        add(hidden, &layer.o.apply(&joined));
        let normed = self.norm(hidden, &layer.post_attention_norm);
        let gate = layer.gate.apply(&normed);
        let up = layer.up.apply(&normed);
        let product: Matrix = gate.iter().zip(&up).map(|(gate, up)| swiglu(gate, up)).collect();
        add(hidden, &layer.down.apply(&product));
    }

    fn logits(&self, row: &[f64]) -> Vec<f64> {
        linear(&rms_norm(row, &self.norm, self.epsilon), &self.lm_head, None)
    }

    /// Full-context logits behind every token.
    pub(crate) fn forward(&self, ids: &[u32]) -> Matrix {
        let mut hidden = self.embed(ids);
        let positions: Vec<usize> = (0..ids.len()).collect();
        let frequencies = self.rope.inverse_frequencies(self.head_dim, ids.len());
        for layer in &self.layers {
            let normed = self.norm(&hidden, &layer.input_norm);
            let q = self.heads(&layer.q.apply(&normed), &positions, Some(&frequencies));
            let k = self.heads(&layer.k.apply(&normed), &positions, Some(&frequencies));
            let v = self.heads(&layer.v.apply(&normed), &positions, None);
            let attended = self.causal(&q, &k, &v);
            self.finish(layer, &mut hidden, &attended);
        }
        hidden.iter().map(|row| self.logits(row)).collect()
    }

    fn embed(&self, ids: &[u32]) -> Matrix {
        ids.iter().map(|id| self.embedding[*id as usize].clone()).collect()
    }

    /// Row i sees rows 0..=i.
    fn causal(&self, q: &[Matrix], k: &[Matrix], v: &[Matrix]) -> Vec<Matrix> {
        let of_head = |head: usize| {
            let kv = head / self.group();
            let queries = q[head].iter().enumerate();
            queries.map(|(row, query)| attend(query, &k[kv], &v[kv], row + 1)).collect()
        };
        (0..self.query_heads).map(of_head).collect()
    }

    /// FastKV's nine steps, or the part of them that the rules ask for. `observation` says how tokens
    /// are scored; where there is none, `given` names the positions that chosen caches keep.
    pub(crate) fn prefill(
        &self,
        ids: &[u32],
        rules: &[Rules],
        observation: Option<Observation>,
        given: Option<&[Vec<Vec<u32>>]>,
    ) -> Sequence<'_> {
        let orders = Orders {
            rules: rules.to_vec(),
            keeps_by: observation,
            hands_on_by: observation,
            given: given.map(<[_]>::to_vec),
            ..Orders::default()
        };
        self.run(ids, &orders)
    }

    /// A prefill as ordered.
    pub(crate) fn run(&self, ids: &[u32], orders: &Orders) -> Sequence<'_> {
        let mut orders = orders.clone();
        let mut nearest_restart = f64::INFINITY;
        let restarted = orders.restart.map(|restart| {
            let (chosen, nearest) = self.first_pass(ids, &orders, restart);
            nearest_restart = nearest;
            if let Some(steering) = &mut orders.steering {
                steering.highlighted = chosen.iter().map(|token| steering.highlighted[*token]).collect();
            }
            chosen
        });
        let ids: Vec<u32> = match &restarted {
            Some(chosen) => chosen.iter().map(|token| ids[*token]).collect(),
            None => ids.to_vec(),
        };
        let mut hidden = self.embed(&ids);
        let mut positions: Vec<usize> = (0..ids.len()).collect();
        let frequencies = self.rope.inverse_frequencies(self.head_dim, ids.len());
        let mut runs = Vec::new();
        for (index, (layer, rules)) in self.layers.iter().zip(&orders.rules).enumerate() {
            assert_eq!(rules.rows, positions.len());
            let n = positions.len();
            let normed = self.norm(&hidden, &layer.input_norm);
            let q = self.heads(&layer.q.apply(&normed), &positions, Some(&frequencies));
            let k = self.heads(&layer.k.apply(&normed), &positions, Some(&frequencies));
            let v = self.heads(&layer.v.apply(&normed), &positions, None);
            let attention = self.attention(&q, &k, &positions, index, orders.steering.as_ref());

            // Steps 1 to 5. Without an observation only the mass is of interest.
            let observed = |observation: Option<Observation>| {
                let window = observation.map_or(8, |observation| observation.window).min(n);
                let seen: Vec<Vec<f64>> =
                    attention.iter().map(|rows| sum_rows(&rows[n - window..], n)).collect();
                let scores = observation.map(|Observation { kind, kernel, .. }| {
                    let pooled: Vec<Vec<f64>> =
                        seen.iter().map(|scores| pool(&scores[..n - window], kind, kernel)).collect();
                    pooled.chunks(self.group()).map(sum_lists).collect::<Vec<_>>()
                });
                (window, seen, scores)
            };
            let measured_by = orders.keeps_by.or(orders.hands_on_by.filter(|_| rules.hands_on.is_some()));
            let (window, seen, _) = observed(measured_by);
            let forced: Vec<usize> = match &orders.steering {
                Some(steering) => (0..n).filter(|row| steering.is_highlighted(positions[*row])).collect(),
                None => Vec::new(),
            };
            let mut scores = orders.keeps_by.and_then(|_| observed(orders.keeps_by).2);
            for scores in scores.iter_mut().flatten() {
                forced.iter().filter(|row| **row < n - window).for_each(|row| scores[*row] = f64::INFINITY);
            }

            // Step 6.
            let mut nearest = nearest_restart;
            let group = |head: usize| &attention[head * self.group()..(head + 1) * self.group()];
            let all_sums: Vec<Vec<f64>> =
                (0..self.kv_heads).map(|head| policies::column_sums(group(head), n)).collect();
            // How many of the scored tokens each head gets.
            let counts = match (&rules.keep, &scores) {
                (Keep::Chosen(count), Some(_)) => vec![count - window; self.kv_heads],
                (Keep::Each(counts), _) => counts.iter().map(|count| count - window).collect(),
                (Keep::Shared(count, alpha), Some(scores)) => {
                    let together: Vec<f64> = scores.iter().flatten().copied().collect();
                    nearest = nearest.min(margin(&together, (count - window) * self.kv_heads));
                    let highlighted = orders.steering.as_ref().map_or(0, |steering| {
                        steering.highlighted.iter().filter(|highlighted| **highlighted).count()
                    });
                    policies::shared_counts(scores, count - window, highlighted, *alpha)
                }
                _ => Vec::new(),
            };
            let row_ids: Vec<u32> = positions.iter().map(|position| ids[*position]).collect();
            let (mut sets, mut recovered) = (Vec::new(), Vec::new());
            let kept: Vec<Vec<usize>> = (0..self.kv_heads)
                .map(|head| match (&rules.keep, &scores) {
                    (Keep::All, _) => (0..n).collect(),
                    (Keep::Ends(first, last), _) => (0..*first).chain(n - last..n).collect(),
                    (Keep::Heavy(count, window), _) => {
                        let mut sums = all_sums[head].clone();
                        forced.iter().for_each(|row| sums[*row] = f64::INFINITY);
                        if *count < n {
                            nearest = nearest.min(margin(&sums[..n - window], count - window));
                        }
                        policies::heavy_hitters(&sums, *count, *window)
                    }
                    (Keep::Recovered(recovery, local, frequent), _) => {
                        let shares = (*recovery, *local, *frequent);
                        let classes = &orders.classes;
                        let set =
                            policies::fastgen(group(head), &row_ids, &positions, classes, &forced, shares);
                        let distance = |mass: &f64| (mass - recovery).abs();
                        nearest =
                            nearest.min(set.recovered.iter().map(distance).fold(f64::INFINITY, f64::min));
                        let count = (n as f64 * frequent).floor() as usize;
                        nearest = nearest.min(margin(&all_sums[head], count));
                        sets.push(set.set);
                        recovered.extend(set.recovered);
                        set.kept
                    }
                    (_, Some(scores)) => {
                        nearest = nearest.min(margin(&scores[head], counts[head]));
                        let mut chosen = top(&scores[head], counts[head]);
                        chosen.extend(n - window..n);
                        chosen
                    }
                    (_, None) => {
                        let given = &orders.given.as_ref().expect("a choice")[index][head];
                        let row =
                            |position: &u32| positions.iter().position(|other| *other == *position as usize);
                        given.iter().map(|position| row(position).expect("a row")).collect()
                    }
                })
                .map(|mut kept: Vec<usize>| {
                    if scores.is_none() && !matches!(rules.keep, Keep::Heavy(..)) {
                        kept.extend(&forced);
                        kept.sort_unstable();
                        kept.dedup();
                    }
                    kept
                })
                .collect();
            let entry = |head: usize, row: usize| Entry {
                position: positions[row],
                key: k[head][row].clone(),
                value: v[head][row].clone(),
                // What H2O ranks highlighted tokens by; FastGen keeps them beside those it ranks.
                sum: match rules.keep {
                    Keep::Heavy(..) if forced.contains(&row) => f64::INFINITY,
                    _ => all_sums[head][row],
                },
            };
            let cache = (0..self.kv_heads)
                .map(|head| kept[head].iter().map(|row| entry(head, *row)).collect())
                .collect();
            let mass = (0..self.kv_heads)
                .map(|head| {
                    let group = &seen[head * self.group()..(head + 1) * self.group()];
                    let on_kept = |scores: &Vec<f64>| kept[head].iter().map(|row| scores[*row]).sum::<f64>();
                    group.iter().map(on_kept).sum::<f64>() / (window * self.group()) as f64
                })
                .collect();

            // Step 7.
            let attended = self.weigh(&attention, &v);
            self.finish(layer, &mut hidden, &attended);

            // Step 8, or PyramidInfer's.
            let read = positions.clone();
            let hands_on = rules.hands_on.map(|count| {
                let (rows, distance) = match rules.recent {
                    Some(recent) => policies::pyramid_infer(&attention, count, recent, &forced),
                    None => {
                        let (window, _, scores) = observed(orders.hands_on_by);
                        let mut sums = sum_lists(scores.as_ref().expect("scores"));
                        forced
                            .iter()
                            .filter(|row| **row < n - window)
                            .for_each(|row| sums[*row] = f64::INFINITY);
                        let mut rows = top(&sums, count - window);
                        rows.extend(n - window..n);
                        (rows, margin(&sums, count - window))
                    }
                };
                nearest = nearest.min(distance);
                rows
            });
            if let Some(rows) = &hands_on {
                hidden = rows.iter().map(|row| hidden[*row].clone()).collect();
                positions = rows.iter().map(|row| read[*row]).collect();
            }
            let hands_on = hands_on.map(|_| positions.clone());
            let keep = rules.keep.clone();
            runs.push(LayerRun { read, cache, hands_on, mass, margin: nearest, keep, sets, recovered });
        }
        // Step 9.
        let logits = self.logits(hidden.last().expect("a row"));
        let (tokens, steering, classes) = (ids.len(), orders.steering, orders.classes);
        let prompt = tokens;
        Sequence { model: self, prompt, tokens, layers: runs, logits, restarted, ids, steering, classes }
    }

    /// GemFilter's first pass: the tokens read anew, and how near that choice was.
    fn first_pass(
        &self,
        ids: &[u32],
        orders: &Orders,
        (filter, count, kernel): (usize, usize, usize),
    ) -> (Vec<usize>, f64) {
        let mut hidden = self.embed(ids);
        let positions: Vec<usize> = (0..ids.len()).collect();
        let frequencies = self.rope.inverse_frequencies(self.head_dim, ids.len());
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = self.norm(&hidden, &layer.input_norm);
            let q = self.heads(&layer.q.apply(&normed), &positions, Some(&frequencies));
            let k = self.heads(&layer.k.apply(&normed), &positions, Some(&frequencies));
            let v = self.heads(&layer.v.apply(&normed), &positions, None);
            if index == filter {
                let last = |head: usize| q[head].last().expect("a query");
                let products: Vec<Vec<f64>> = (0..self.query_heads)
                    .map(|head| k[head / self.group()].iter().map(|key| dot(last(head), key)).collect())
                    .collect();
                let is_forced = |token: usize| {
                    orders.steering.as_ref().is_some_and(|steering| steering.is_highlighted(token))
                };
                return policies::gemfilter(&products, kernel, count, is_forced);
            }
            let attention = self.attention(&q, &k, &positions, index, orders.steering.as_ref());
            let attended = self.weigh(&attention, &v);
            self.finish(layer, &mut hidden, &attended);
        }
        unreachable!("a filter layer")
    }

    /// Causal probabilities `[query head][query][key]`, of steered heads with their bias.
    fn attention(
        &self,
        q: &[Matrix],
        k: &[Matrix],
        positions: &[usize],
        layer: usize,
        steering: Option<&Steering>,
    ) -> Vec<Matrix> {
        (0..self.query_heads)
            .map(|head| {
                let bias: Vec<f64> = positions
                    .iter()
                    .map(|position| steering.map_or(0.0, |s| s.bias(layer, head, *position)))
                    .collect();
                let queries = q[head].iter().enumerate();
                queries
                    .map(|(row, query)| biased_probabilities(query, &k[head / self.group()][..=row], &bias))
                    .collect()
            })
            .collect()
    }

    /// Values weighted by probabilities: `[query head][query]`.
    fn weigh(&self, attention: &[Matrix], v: &[Matrix]) -> Vec<Matrix> {
        let heads = attention.iter().enumerate();
        heads
            .map(|(head, rows)| rows.iter().map(|row| weighted(row, &v[head / self.group()])).collect())
            .collect()
    }
}

impl Sequence<'_> {
    /// Reads more tokens at their true positions. All are kept, but for what the rule of a layer lets go
    /// of behind the last of them. Keys in the cache stay as they are turned.
    pub(crate) fn append(&mut self, ids: &[u32]) -> &[f64] {
        let model = self.model;
        let positions: Vec<usize> = (self.tokens..self.tokens + ids.len()).collect();
        self.tokens += ids.len();
        self.ids.extend(ids);
        let frequencies = model.rope.inverse_frequencies(model.head_dim, self.tokens);
        let mut hidden = model.embed(ids);
        for (index, (layer, run)) in model.layers.iter().zip(&mut self.layers).enumerate() {
            let normed = model.norm(&hidden, &layer.input_norm);
            let q = model.heads(&layer.q.apply(&normed), &positions, Some(&frequencies));
            let k = model.heads(&layer.k.apply(&normed), &positions, Some(&frequencies));
            let v = model.heads(&layer.v.apply(&normed), &positions, None);
            let mut attended: Vec<Matrix> = vec![Vec::new(); model.query_heads];
            for row in 0..ids.len() {
                for (head, cache) in run.cache.iter_mut().enumerate() {
                    let (key, value) = (k[head][row].clone(), v[head][row].clone());
                    cache.push(Entry { position: positions[row], key, value, sum: 0.0 });
                }
                for head in 0..model.query_heads {
                    let cache = &mut run.cache[head / model.group()];
                    let keys: Matrix = cache.iter().map(|entry| entry.key.clone()).collect();
                    let values: Matrix = cache.iter().map(|entry| entry.value.clone()).collect();
                    let bias = |entry: &Entry| {
                        self.steering
                            .as_ref()
                            .map_or(0.0, |steering| steering.bias(index, head, entry.position))
                    };
                    let bias: Vec<f64> = cache.iter().map(bias).collect();
                    let probabilities = biased_probabilities(&q[head][row], &keys, &bias);
                    attended[head].push(weighted(&probabilities, &values));
                    cache.iter_mut().zip(probabilities).for_each(|(entry, p)| entry.sum += p);
                }
            }
            model.finish(layer, &mut hidden, &attended);
            match run.keep {
                Keep::Heavy(count, window) => {
                    run.cache
                        .iter_mut()
                        .for_each(|cache| evict_lightest(cache, count, window, &mut run.margin));
                }
                Keep::Recovered(_, local, frequent) => {
                    for (cache, set) in run.cache.iter_mut().zip(&run.sets) {
                        let highlighted = |position| {
                            self.steering.as_ref().is_some_and(|steering| steering.is_highlighted(position))
                        };
                        let behind = self.prompt..self.ids.len();
                        let read: Vec<usize> = run.read.iter().copied().chain(behind).collect();
                        let classes = &self.classes;
                        keep_set(cache, *set, &read, &self.ids, classes, (local, frequent), highlighted);
                    }
                }
                _ => {}
            }
        }
        self.logits = model.logits(hidden.last().expect("a row"));
        &self.logits
    }

    /// Original positions of the cache, by layer and kv head.
    pub(crate) fn positions(&self) -> Vec<Vec<Vec<u32>>> {
        let of_head = |head: &Vec<Entry>| head.iter().map(|entry| entry.position as u32).collect();
        self.layers.iter().map(|layer| layer.cache.iter().map(of_head).collect()).collect()
    }

    /// The nearest choice of all.
    pub(crate) fn margin(&self) -> f64 {
        self.layers.iter().map(|layer| layer.margin).fold(f64::INFINITY, f64::min)
    }
}

/// H2O: evicts the lowest sum outside the newest W, of equal sums the higher index, until the budget
/// holds; tells how near a choice was.
fn evict_lightest(cache: &mut Vec<Entry>, count: usize, window: usize, margin: &mut f64) {
    while cache.len() > count {
        let older = cache.len() - window;
        let mut lightest = 0;
        for index in 0..older {
            if cache[index].sum <= cache[lightest].sum {
                lightest = index;
            }
        }
        let sum = cache[lightest].sum;
        for (index, entry) in cache[..older].iter().enumerate() {
            if index != lightest && sum > 0.0 {
                *margin = margin.min((entry.sum - sum) / sum);
            }
        }
        cache.remove(lightest);
    }
}

/// FastGen in decoding: a head's set of all tokens that its layer read so far, of those still there.
fn keep_set(
    cache: &mut Vec<Entry>,
    set: usize,
    read: &[usize],
    ids: &[u32],
    classes: &Classes,
    (local, frequent): (f64, f64),
    highlighted: impl Fn(usize) -> bool,
) {
    let share = |rate: f64| (read.len() as f64 * rate).floor() as usize;
    let newest = &read[read.len() - share(local)..];
    let sums: Vec<f64> = cache.iter().map(|entry| entry.sum).collect();
    let frequent = top(&sums, share(frequent));
    let mut index = 0;
    cache.retain(|entry| {
        let (id, position) = (&ids[entry.position], entry.position);
        let kept = set == 4
            || position < 4
            || highlighted(position)
            || classes.special.contains(id)
            || set >= 1 && classes.punctuation.contains(id)
            || set >= 2 && frequent.contains(&index)
            || set >= 3 && newest.contains(&position);
        index += 1;
        kept
    });
}

/// Sums of rows of different lengths, over keys.
fn sum_rows(rows: &[Vec<f64>], keys: usize) -> Vec<f64> {
    let mut sums = vec![0.0; keys];
    for row in rows {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += value;
        }
    }
    sums
}

fn add(rows: &mut Matrix, others: &Matrix) {
    for (row, other) in rows.iter_mut().zip(others) {
        for (value, other) in row.iter_mut().zip(other) {
            *value += other;
        }
    }
}
