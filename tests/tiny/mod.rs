//! Tiny random models, written to a directory as Hugging Face publishes them.

#![allow(dead_code, reason = "every test binary uses its own part")]

pub(crate) mod lookup;

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

/// Random numbers of a test: xorshift64*.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1);
        for _ in 0..8 {
            rng.next();
        }
        rng
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// In [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() >> 16) as usize % end
    }

    /// About normal: mean 0, deviation 1.
    pub(crate) fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12).map(|_| self.unit()).sum();
        (sum - 6.0) as f32
    }

    pub(crate) fn normals(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.normal() * scale).collect()
    }

    pub(crate) fn ids(&mut self, count: usize, vocabulary: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(vocabulary) as u32).collect()
    }
}

/// How numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    Bf16,
    F16,
}

impl Stored {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }

    pub(crate) fn bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::Bf16 => {
                values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect()
            }
            Self::F16 => values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect(),
        }
    }

    /// What is left of the numbers after storing them.
    pub(crate) fn rounded(self, values: &[f32]) -> Vec<f32> {
        match self {
            Self::F32 => values.to_vec(),
            Self::Bf16 => values.iter().map(|value| half::bf16::from_f32(*value).to_f32()).collect(),
            Self::F16 => values.iter().map(|value| half::f16::from_f32(*value).to_f32()).collect(),
        }
    }
}

/// One tensor of a file.
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) stored: Stored,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

/// Writes `model.safetensors`. The data begin `shift` bytes off an aligned place.
pub(crate) fn write_safetensors(directory: &Path, tensors: &[Tensor], shift: usize) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for Tensor { name, stored, shape, values } in tensors {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        let first = data.len();
        data.extend(stored.bytes(values));
        let offsets = [first, data.len()];
        header
            .insert(name.clone(), json!({ "dtype": stored.name(), "shape": shape, "data_offsets": offsets }));
    }
    let mut header = Value::Object(header).to_string();
    while header.len() % 64 != (56 + shift) % 64 {
        header.push(' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(data);
    std::fs::write(directory.join("model.safetensors"), file).expect("a writable directory");
}

/// A model to make.
#[derive(Clone, Debug)]
pub(crate) struct Tiny {
    pub(crate) seed: u64,
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) query_heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocabulary: usize,
    pub(crate) context: usize,
    pub(crate) bias: bool,
    pub(crate) tied: bool,
    pub(crate) stored: Stored,
    /// Put beside the other fields of config.json.
    pub(crate) rope: Value,
    /// How sharply heads attend.
    pub(crate) sharpness: f32,
    /// Bytes that the weights lie off an aligned place.
    pub(crate) shift: usize,
}

impl Default for Tiny {
    fn default() -> Self {
        Self {
            seed: 1,
            layers: 4,
            hidden: 24,
            intermediate: 32,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 8,
            vocabulary: 64,
            context: 4096,
            bias: false,
            tied: false,
            stored: Stored::F32,
            rope: json!({ "rope_theta": 10000.0 }),
            sharpness: 1.5,
            shift: 0,
        }
    }
}

impl Tiny {
    /// The tensors, in the order of a forward pass.
    pub(crate) fn tensors(&self) -> Vec<Tensor> {
        let mut rng = Rng::new(self.seed);
        let mut tensors = Vec::new();
        let stored = self.stored;
        let mut put = |name: String, shape: Vec<usize>, values: Vec<f32>| {
            tensors.push(Tensor { name, stored, shape, values });
        };
        let (hidden, inner) = (self.hidden, self.intermediate);
        let (queries, keys) = (self.query_heads * self.head_dim, self.kv_heads * self.head_dim);
        let table = vec![self.vocabulary, hidden];
        put(
            "model.embed_tokens.weight".to_owned(),
            table.clone(),
            rng.normals(self.vocabulary * hidden, 1.0),
        );
        let norm = |rng: &mut Rng| (0..hidden).map(|_| 1.0 + 0.1 * rng.normal()).collect::<Vec<_>>();
        for layer in 0..self.layers {
            let prefix = format!("model.layers.{layer}");
            put(format!("{prefix}.input_layernorm.weight"), vec![hidden], norm(&mut rng));
            put(format!("{prefix}.post_attention_layernorm.weight"), vec![hidden], norm(&mut rng));
            for (name, outputs, inputs, gain) in [
                ("self_attn.q", queries, hidden, self.sharpness),
                ("self_attn.k", keys, hidden, self.sharpness),
                ("self_attn.v", keys, hidden, 1.0),
                ("self_attn.o", hidden, queries, 1.0),
                ("mlp.gate", inner, hidden, 1.0),
                ("mlp.up", inner, hidden, 1.0),
                ("mlp.down", hidden, inner, 1.0),
            ] {
                let module = format!("{prefix}.{name}_proj");
                let weight = rng.normals(outputs * inputs, gain / (inputs as f32).sqrt());
                put(format!("{module}.weight"), vec![outputs, inputs], weight);
                if self.bias {
                    put(format!("{module}.bias"), vec![outputs], rng.normals(outputs, 0.5));
                }
            }
        }
        put("model.norm.weight".to_owned(), vec![hidden], norm(&mut rng));
        if !self.tied {
            put("lm_head.weight".to_owned(), table, rng.normals(self.vocabulary * hidden, 0.3));
        }
        tensors
    }

    pub(crate) fn config(&self) -> Value {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "attention_bias": self.bias,
            "mlp_bias": self.bias,
            "tie_word_embeddings": self.tied,
        });
        for (field, value) in self.rope.as_object().expect("fields") {
            config[field] = value.clone();
        }
        config
    }

    /// Writes the directory.
    pub(crate) fn write(&self) -> TempDir {
        self.write_with(&self.tensors())
    }

    /// Writes the directory with other weights.
    pub(crate) fn write_with(&self, tensors: &[Tensor]) -> TempDir {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let config = serde_json::to_vec_pretty(&self.config()).expect("JSON");
        std::fs::write(directory.path().join("config.json"), config).expect("a writable directory");
        write_safetensors(directory.path(), tensors, self.shift);
        directory
    }
}
