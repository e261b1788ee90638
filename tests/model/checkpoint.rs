//! Safetensors: all fixtures, and files that are damaged or lie.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
#[cfg(unix)]
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use fastkv::model::{Checkpoint, Dtype, LlamaWeights, ModelDir, ModelError, StoredTensor};
use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{assert_refused, copy_of_model, fixture_dirs, fixtures, read_json};

/// A safetensors file by hand.
fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn directory_with(file: &[u8]) -> TempDir {
    let directory = TempDir::new().expect("temporary directory");
    fs::write(directory.path().join("model.safetensors"), file).expect("written");
    directory
}

fn open_bytes(file: &[u8]) -> Result<Checkpoint, ModelError> {
    Checkpoint::open(directory_with(file).path())
}

/// Applies `change` to the header of a safetensors file.
fn edit_header(path: &Path, change: impl FnOnce(&mut Value)) {
    let bytes = fs::read(path).expect("readable");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("JSON");
    change(&mut header);
    fs::write(path, safetensors(&header.to_string(), &bytes[8 + length..])).expect("written");
}

fn is_plain<T: Clone + Send + Sync + 'static>(_: &T) {}

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn fixtures_hold_the_weights_that_transformers_saw() {
    for directory in fixture_dirs("models") {
        let model = ModelDir::open(&directory).unwrap_or_else(|error| panic!("{error}"));
        let sums = read_json(&directory.join("expected.json"))["weights"].clone();
        let sums = sums.as_object().expect("sums");
        assert_eq!(model.weights.tensors().count(), sums.len(), "{}", directory.display());
        let dtype = match &directory.file_name().expect("name").to_string_lossy()[..3] {
            "bf1" => Dtype::Bf16,
            "f16" => Dtype::F16,
            _ => Dtype::F32,
        };
        let mut bytes = 0;
        for tensor in model.weights.tensors() {
            is_plain(tensor);
            let values = tensor.to_f32();
            let sum: f64 = values.iter().map(|value| f64::from(value.abs())).sum();
            let expected = sums[tensor.name()].as_f64().expect("a number");
            assert!((sum - expected).abs() <= 1e-9 * expected, "{tensor:?}: {sum} and {expected}");
            assert_eq!(tensor.dtype(), dtype, "{tensor:?}");
            assert_eq!(tensor.len(), tensor.shape().iter().product::<usize>());
            assert_eq!(tensor.bytes().len(), tensor.len() * dtype.size());
            bytes += tensor.bytes().len() as u64;
        }
        assert_eq!((model.checkpoint.total_bytes(), model.weights.total_bytes()), (bytes, bytes));
        assert_eq!(model.weights.tied, model.config.tie_word_embeddings);
        assert_eq!(model.weights.lm_head.name() == model.weights.embedding.name(), model.weights.tied);
        assert_eq!(model.weights.layers[0].q.bias.is_some(), model.config.attention_bias);
        assert_eq!(model.weights.layers[0].down.bias.is_some(), model.config.mlp_bias);

        let last = AtomicU64::new(0);
        let progress = |done, total| {
            assert_eq!(total, bytes);
            last.fetch_max(done, Ordering::Relaxed);
            ControlFlow::Continue(())
        };
        model.checkpoint.check_finite(progress).expect("finite");
        assert_eq!(last.into_inner(), bytes);
        model.weights.check_finite(go_on).expect("finite");
    }
}

#[test]
fn every_weight_is_the_tensor_of_its_name() {
    let model = ModelDir::open(fixtures().join("models/f32-bias")).expect("valid");
    let (hidden, queries, keys, intermediate) = (48, 48, 16, 56);
    for (index, layer) in model.weights.layers.iter().enumerate() {
        for (norm, name) in
            [(&layer.input_norm, "input_layernorm"), (&layer.post_attention_norm, "post_attention_layernorm")]
        {
            assert_eq!(norm.name(), format!("model.layers.{index}.{name}.weight"));
            assert_eq!(norm.shape(), [hidden]);
        }
        for (linear, name, shape) in [
            (&layer.q, "self_attn.q_proj", [queries, hidden]),
            (&layer.k, "self_attn.k_proj", [keys, hidden]),
            (&layer.v, "self_attn.v_proj", [keys, hidden]),
            (&layer.o, "self_attn.o_proj", [hidden, queries]),
            (&layer.gate, "mlp.gate_proj", [intermediate, hidden]),
            (&layer.up, "mlp.up_proj", [intermediate, hidden]),
            (&layer.down, "mlp.down_proj", [hidden, intermediate]),
        ] {
            let bias = linear.bias.as_ref().expect("a bias");
            assert_eq!(linear.weight.name(), format!("model.layers.{index}.{name}.weight"));
            assert_eq!(bias.name(), format!("model.layers.{index}.{name}.bias"));
            assert_eq!((linear.weight.shape(), bias.shape()), (&shape[..], &shape[..1]));
        }
    }
    assert_eq!(model.weights.embedding.name(), "model.embed_tokens.weight");
    assert_eq!(model.weights.norm.name(), "model.norm.weight");
    assert_eq!(model.weights.lm_head.name(), "lm_head.weight");
}

#[test]
fn a_handle_outlives_the_checkpoint_and_the_file() {
    let copy = copy_of_model("bf16-gqa4");
    let checkpoint = Checkpoint::open(copy.path()).expect("valid");
    let norm = checkpoint.tensor("model.norm.weight", &[64]).expect("there");
    let before = norm.to_f32();
    drop(checkpoint);
    drop(copy);
    let after = std::thread::spawn(move || norm.to_f32()).join().expect("no panic");
    assert_eq!(before, after);
}

#[test]
fn elements_are_read_at_any_alignment() {
    let values: Vec<f32> = (0..10).map(|value| value as f32 * 0.37 - 1.0).collect();
    let check = |tensor: &StoredTensor, expected: &[f32]| {
        assert_eq!(tensor.to_f32(), expected);
        let mut some = [0.0; 3];
        tensor.read_f32(4, &mut some);
        assert_eq!(some, expected[4..7]);
    };
    // A header one byte longer shifts all data by one.
    for blanks in 0..8 {
        let header = json!({
            "h": {"dtype": "F16", "shape": [10], "data_offsets": [0, 20]},
            "b": {"dtype": "BF16", "shape": [2, 5], "data_offsets": [20, 40]},
            "s": {"dtype": "F32", "shape": [10, 1], "data_offsets": [40, 80]},
        });
        let halves: Vec<f16> = values.iter().map(|value| f16::from_f32(*value)).collect();
        let brains: Vec<bf16> = values.iter().map(|value| bf16::from_f32(*value)).collect();
        let data: Vec<u8> = halves
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .chain(brains.iter().flat_map(|value| value.to_le_bytes()))
            .chain(values.iter().flat_map(|value| value.to_le_bytes()))
            .collect();
        let header = format!("{header}{}", " ".repeat(blanks));
        let checkpoint = open_bytes(&safetensors(&header, &data)).expect("valid");
        let (h, b, s) = (
            checkpoint.tensor("h", &[10]).expect("there"),
            checkpoint.tensor("b", &[2, 5]).expect("there"),
            checkpoint.tensor("s", &[10, 1]).expect("there"),
        );
        assert_eq!(h.elements::<f16>().expect("f16").as_ref(), halves);
        assert_eq!(b.elements::<bf16>().expect("bf16").as_ref(), brains);
        assert_eq!(s.elements::<f32>().expect("f32").as_ref(), values);
        assert!(h.elements::<bf16>().is_none() && s.elements::<f16>().is_none());
        check(&s, &values);
        check(&h, &halves.iter().map(|value| value.to_f32()).collect::<Vec<_>>());
        check(&b, &brains.iter().map(|value| value.to_f32()).collect::<Vec<_>>());
    }
}

#[test]
fn long_tensors_are_widened_whole() {
    let count = (1 << 20) * 2 + 5;
    let data: Vec<u8> =
        (0..count).flat_map(|value: u32| bf16::from_f32((value % 251) as f32).to_le_bytes()).collect();
    let header = json!({"t": {"dtype": "BF16", "shape": [count], "data_offsets": [0, data.len()]}});
    let checkpoint = open_bytes(&safetensors(&header.to_string(), &data)).expect("valid");
    let values = checkpoint.tensor("t", &[count as usize]).expect("there").to_f32();
    assert!(values.iter().enumerate().all(|(index, value)| *value == (index % 251) as f32));
}

#[test]
fn the_first_element_that_is_not_finite_is_named() {
    let count = 3 << 20;
    for (dtype, size, infinity, nan) in [
        ("F32", 4, f32::NEG_INFINITY.to_le_bytes().to_vec(), f32::NAN.to_le_bytes().to_vec()),
        ("BF16", 2, bf16::NEG_INFINITY.to_le_bytes().to_vec(), bf16::NAN.to_le_bytes().to_vec()),
        ("F16", 2, f16::NEG_INFINITY.to_le_bytes().to_vec(), f16::NAN.to_le_bytes().to_vec()),
    ] {
        let mut data = vec![0; 2 * count * size];
        let header = json!({
            "a": {"dtype": dtype, "shape": [count], "data_offsets": [0, count * size]},
            "b": {"dtype": dtype, "shape": [3, count / 3], "data_offsets": [count * size, 2 * count * size]},
        })
        .to_string();
        open_bytes(&safetensors(&header, &data))
            .expect("valid")
            .check_finite(go_on)
            .expect("zeros are finite");
        for (tensor, element, value) in [(1, 2_000_001, &nan), (1, 2_000_000, &infinity)] {
            let at = (tensor * count + element) * size;
            data[at..at + size].copy_from_slice(value);
        }
        let checkpoint = open_bytes(&safetensors(&header, &data)).expect("valid");
        assert_refused(
            checkpoint.check_finite(go_on),
            &["model.safetensors", "`b`", dtype, "-inf", "2000000"],
        );
        // One thread meets the last element of `a` long after another has met the first of `b`.
        for at in [(count - 1) * size, count * size] {
            data[at..at + size].copy_from_slice(&nan);
        }
        let checkpoint = open_bytes(&safetensors(&header, &data)).expect("valid");
        assert_refused(checkpoint.check_finite(go_on), &["`a`", dtype, "NaN", "3145727"]);
        let stopped = checkpoint.check_finite(|_, _| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(ModelError::Cancelled)), "{stopped:?}");
    }
}

#[test]
fn largest_and_smallest_values_are_finite() {
    let values = [f16::MAX, f16::MIN, f16::from_bits(1), f16::NEG_ZERO];
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let header = json!({"t": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}});
    open_bytes(&safetensors(&header.to_string(), &data)).expect("valid").check_finite(go_on).expect("finite");
}

#[test]
fn damaged_files_are_refused_with_file_and_tensor() {
    let good = json!({
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    });
    let refused = |change: &dyn Fn(&mut Value), data: usize, parts: &[&str]| {
        let mut header = good.clone();
        change(&mut header);
        let result = open_bytes(&safetensors(&header.to_string(), &vec![0; data]));
        assert_refused(result, &[parts, &["model.safetensors"]].concat());
    };
    open_bytes(&safetensors(&good.to_string(), &[0; 16])).expect("valid");
    refused(&|_| {}, 12, &["`b`", "8..16", "has 12", "truncated"]);
    refused(&|_| {}, 4, &["`a`", "truncated"]);
    refused(&|_| {}, 20, &["end at byte 16", "has 20"]);
    refused(&|header| header["b"]["data_offsets"] = json!([4, 12]), 12, &["`b`", "overlaps"]);
    refused(&|header| header["b"]["data_offsets"] = json!([12, 20]), 20, &["`b`", "gap"]);
    refused(&|header| header["b"]["data_offsets"] = json!([16, 8]), 16, &["`b`"]);
    refused(&|header| header["b"]["data_offsets"] = json!([8, u64::MAX]), 16, &["`b`"]);
    refused(&|header| header["b"]["data_offsets"] = json!([8]), 16, &["`b`", "data_offsets"]);
    refused(&|header| header["b"]["data_offsets"] = json!([-8, 8]), 16, &["`b`", "data_offsets"]);
    refused(&|header| header["b"]["shape"] = json!([3]), 16, &["`b`", "[3]", "8 bytes"]);
    refused(&|header| header["b"]["shape"] = json!([u64::MAX, 2]), 16, &["`b`"]);
    refused(&|header| header["b"]["shape"] = json!("2"), 16, &["`b`", "shape"]);
    refused(&|header| header["b"]["dtype"] = json!("F24"), 16, &["`b`", "dtype"]);
    refused(&|header| header["b"] = json!(7), 16, &["`b`"]);
    refused(&|header| *header = json!([1, 2]), 16, &["safetensors"]);

    assert_refused(open_bytes(&[]), &["model.safetensors", "0 bytes"]);
    assert_refused(open_bytes(&[1, 2, 3]), &["model.safetensors", "3 bytes"]);
    assert_refused(open_bytes(&u64::MAX.to_le_bytes()), &["18446744073709551615", "has 8"]);
    assert_refused(open_bytes(&safetensors("{}", &[])[..9]), &["2 bytes long", "has 9"]);
    assert_refused(open_bytes(&safetensors("{\u{e9}", &[])), &["model.safetensors"]);
    assert_refused(open_bytes(&safetensors("not json", &[])), &["model.safetensors", "JSON"]);
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    assert_refused(open_bytes(pointer), &["model.safetensors", "header"]);
}

#[test]
fn weights_that_do_not_fit_the_configuration_are_refused() {
    let missing = |name: &str, file: &str, tensor: &str, parts: &[&str]| {
        let copy = copy_of_model(name);
        edit_header(&copy.path().join(file), |header| {
            let header = header.as_object_mut().expect("an object");
            let info = header.remove(tensor).expect("the tensor was there");
            header.insert("elsewhere".to_owned(), info);
        });
        assert_refused(ModelDir::open(copy.path()), &[parts, &[tensor, "missing"]].concat());
    };
    missing("bf16-gqa4", "model.safetensors", "model.layers.1.mlp.up_proj.weight", &["model.safetensors"]);
    missing("bf16-gqa4", "model.safetensors", "model.embed_tokens.weight", &["model.safetensors"]);
    missing("bf16-gqa4", "model.safetensors", "lm_head.weight", &["tie_word_embeddings = false"]);
    missing("f32-bias", "model.safetensors", "model.layers.0.self_attn.o_proj.bias", &[]);

    let copy = copy_of_model("bf16-gqa4");
    let config = copy.path().join("config.json");
    let change = |field: &str, value: Value| {
        let mut changed = read_json(&fixtures().join("models/bf16-gqa4/config.json"));
        changed[field] = value;
        fs::write(&config, changed.to_string()).expect("written");
        ModelDir::open(copy.path())
    };
    let shapes = change("num_key_value_heads", json!(4));
    assert_refused(
        shapes,
        &["model.safetensors", "layers.0.self_attn.k_proj.weight", "[16, 64]", "[32, 64]"],
    );
    assert_refused(change("vocab_size", json!(97)), &["model.embed_tokens.weight", "[96, 64]", "[97, 64]"]);
    assert_refused(change("num_hidden_layers", json!(3)), &["model.layers.2.", "missing"]);
    assert_refused(change("attention_bias", json!(true)), &["q_proj.bias", "missing"]);
    change("num_hidden_layers", json!(1)).expect("what is left over is left alone");

    let copy = copy_of_model("f32-bias");
    let mut changed = read_json(&copy.path().join("config.json"));
    changed["mlp_bias"] = json!(false);
    fs::write(copy.path().join("config.json"), changed.to_string()).expect("written");
    assert_refused(ModelDir::open(copy.path()), &["gate_proj.bias", "mlp_bias = false"]);
}

#[test]
fn other_types_are_refused_by_name() {
    for dtype in ["I16", "U16"] {
        let copy = copy_of_model("bf16-gqa4");
        edit_header(&copy.path().join("model.safetensors"), |header| {
            header["model.norm.weight"]["dtype"] = json!(dtype)
        });
        assert_refused(
            ModelDir::open(copy.path()),
            &["model.safetensors", "`model.norm.weight`", dtype, "BF16, F16, F32"],
        );
    }
    let header = json!({"t": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).to_string();
    let checkpoint = open_bytes(&safetensors(&header, &[0; 4])).expect("valid as a file");
    assert_refused(checkpoint.tensor("t", &[4]), &["`t`", "F8_E4M3"]);
}

#[test]
fn tied_models_use_a_head_of_their_own_if_it_differs() {
    let copy = copy_of_model("bf16-gqa4");
    let mut config = read_json(&copy.path().join("config.json"));
    config["tie_word_embeddings"] = json!(true);
    fs::write(copy.path().join("config.json"), config.to_string()).expect("written");
    let model = ModelDir::open(copy.path()).expect("valid");
    assert!(!model.weights.tied);
    assert_eq!(model.weights.lm_head.name(), "lm_head.weight");

    // The same numbers twice are one matrix.
    let file = copy.path().join("model.safetensors");
    let (head, embedding) =
        (model.weights.lm_head.bytes().to_vec(), model.weights.embedding.bytes().to_vec());
    drop(model);
    let mut bytes = fs::read(&file).expect("readable");
    let at = bytes.windows(head.len()).position(|window| window == head).expect("the head is in the file");
    bytes[at..at + head.len()].copy_from_slice(&embedding);
    fs::write(&file, bytes).expect("written");
    let model = ModelDir::open(copy.path()).expect("valid");
    assert!(model.weights.tied);
    assert_eq!(model.weights.lm_head.name(), "model.embed_tokens.weight");
}

#[test]
fn shards_and_index_must_fit_each_other() {
    let name = "f16-gqa6-sharded";
    let tensor = "model.norm.weight";
    let index = |copy: &TempDir| copy.path().join("model.safetensors.index.json");
    let refused = |shard: Value, parts: &[&str]| {
        let copy = copy_of_model(name);
        let mut changed = read_json(&index(&copy));
        changed["weight_map"][tensor] = shard;
        fs::write(index(&copy), changed.to_string()).expect("written");
        assert_refused(ModelDir::open(copy.path()), &[parts, &["index.json", tensor]].concat());
    };
    for outside in [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "./model-00001-of-00008.safetensors",
        "..",
        ".",
        "",
        "model-00001-of-00008.safetensors/",
    ] {
        refused(json!(outside), &["without any path", &format!("`{outside}`")]);
    }
    refused(json!("model-00009-of-00008.safetensors"), &["model-00009-of-00008.safetensors", "no such file"]);
    let other = read_json(
        &fixtures()
            .join("models")
            .join(name)
            .join("model.safetensors.index.json"),
    )["weight_map"]["model.embed_tokens.weight"]
        .clone();
    assert_ne!(
        read_json(&fixtures().join("models").join(name).join("model.safetensors.index.json"))["weight_map"]
            [tensor],
        other
    );
    refused(other.clone(), &[other.as_str().expect("a name"), "no such tensor"]);
    refused(json!(3), &["3", "not a file name"]);

    let copy = copy_of_model(name);
    fs::remove_file(copy.path().join(other.as_str().expect("a name"))).expect("removed");
    assert_refused(
        ModelDir::open(copy.path()),
        &["index.json", other.as_str().expect("a name"), "incomplete"],
    );

    let copy = copy_of_model(name);
    let mut changed = read_json(&index(&copy));
    changed["weight_map"].as_object_mut().expect("a map").remove(tensor);
    fs::write(index(&copy), changed.to_string()).expect("written");
    assert_refused(ModelDir::open(copy.path()), &["index.json", tensor, "missing"]);

    for text in ["", "[]", "{}", "{\"weight_map\": 3}", "{\"weight_map\": {}}", "{\"weight_map\""] {
        let copy = copy_of_model(name);
        fs::write(index(&copy), text).expect("written");
        assert_refused(ModelDir::open(copy.path()), &["index.json"]);
    }

    let copy = copy_of_model(name);
    let shard = copy.path().join(other.as_str().expect("a name"));
    let bytes = fs::read(&shard).expect("readable");
    fs::write(&shard, &bytes[..bytes.len() - 1]).expect("written");
    assert_refused(
        ModelDir::open(copy.path()),
        &[other.as_str().expect("a name"), "model.embed_tokens.weight", "truncated"],
    );
}

#[test]
fn a_single_file_wins_over_an_index() {
    let copy = copy_of_model("bf16-gqa4");
    fs::write(copy.path().join("model.safetensors.index.json"), "nonsense").expect("written");
    ModelDir::open(copy.path()).expect("the index is not read");
}

#[test]
fn missing_weights_say_what_to_do() {
    let copy = copy_of_model("bf16-gqa4");
    fs::remove_file(copy.path().join("model.safetensors")).expect("removed");
    assert_refused(ModelDir::open(copy.path()), &["model.safetensors", "no such file", "index.json"]);
    fs::write(copy.path().join("pytorch_model.bin"), "").expect("written");
    assert_refused(ModelDir::open(copy.path()), &["pytorch_model.bin", "transformers"]);
    fs::create_dir(copy.path().join("model.safetensors")).expect("created");
    assert_refused(ModelDir::open(copy.path()), &["model.safetensors"]);
}

/// It waits for nobody to write into it.
#[cfg(unix)]
#[test]
fn a_pipe_is_no_checkpoint() {
    let directory = TempDir::new().expect("temporary directory");
    let made = Command::new("mkfifo").arg(directory.path().join("model.safetensors")).status();
    assert!(made.expect("mkfifo").success());
    assert_refused(Checkpoint::open(directory.path()), &["model.safetensors", "not a regular file"]);
}

fn valid_file() -> Vec<u8> {
    fs::read(fixtures().join("models/f32-mistral-window/model.safetensors")).expect("readable")
}

/// Opens a damaged model; if that works, reads every byte of it.
fn use_all(file: &[u8]) -> Result<(), ModelError> {
    let directory = directory_with(file);
    let checkpoint = Checkpoint::open(directory.path())?;
    let config =
        fastkv::model::LlamaConfig::from_file(&fixtures().join("models/f32-mistral-window/config.json"))?;
    let weights = LlamaWeights::find(&checkpoint, &config)?;
    for tensor in weights.tensors() {
        assert_eq!(tensor.to_f32().len(), tensor.shape().iter().product::<usize>());
    }
    weights.check_finite(go_on)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_truncated_file_is_an_error_and_no_panic(at in 0..valid_file().len()) {
        prop_assert!(use_all(&valid_file()[..at]).is_err());
    }

    #[test]
    fn changed_header_bytes_never_panic(changes in prop::collection::vec((0_usize..3000, any::<u8>()), 1..4)) {
        let mut file = valid_file();
        for (at, byte) in changes {
            file[at] = byte;
        }
        let _ = use_all(&file);
    }

    #[test]
    fn changed_digits_never_panic(at in 0_usize..3000, digit in b'0'..=b'9') {
        let mut file = valid_file();
        if let Some(found) = file[8..3000].iter().skip(at).position(u8::is_ascii_digit) {
            file[8 + at + found] = digit;
        }
        let _ = use_all(&file);
    }
}
