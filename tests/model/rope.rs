//! Inverse frequencies against those of transformers.

use fastkv::model::{LlamaConfig, RopeConfig, RopeScaling};

use super::{fixture_dirs, fixtures, floats, read_json};

/// PyTorch's vectorised power is good to 1 ulp, the steps after it add as much again, and the dynamic
/// type takes a power of a power.
const ULPS: u32 = 3;
const DYNAMIC_ULPS: u32 = 6;

#[track_caller]
fn assert_close(rope: &RopeConfig, computed: &[f32], expected: &[f32], what: &str) {
    let most = if matches!(rope.scaling, RopeScaling::Dynamic { .. }) { DYNAMIC_ULPS } else { ULPS };
    assert_eq!(computed.len(), expected.len(), "{what}");
    for (pair, (computed, expected)) in computed.iter().zip(expected).enumerate() {
        let ulps = computed.to_bits().abs_diff(expected.to_bits());
        assert!(ulps <= most, "{what}: f[{pair}] is {computed:e}, not {expected:e} ({ulps} ulps)");
    }
}

#[test]
fn tables_of_the_tiny_models_are_those_of_transformers() {
    for directory in fixture_dirs("models") {
        let config = LlamaConfig::from_file(&directory.join("config.json")).expect("valid");
        for table in read_json(&directory.join("expected.json"))["rope"].as_array().expect("tables") {
            let length = table["sequence_length"].as_u64().expect("a length") as usize;
            let computed = config.rope.inverse_frequencies(config.head_dim, length);
            let what = format!("{} at {length}", directory.display());
            assert_close(&config.rope, &computed, &floats(&table["inverse_frequencies"]), &what);
        }
    }
}

#[test]
fn tables_of_published_sizes_are_those_of_transformers() {
    for case in read_json(&fixtures().join("rope.json")).as_array().expect("cases") {
        let config = LlamaConfig::from_json(&case["config"].to_string()).expect("valid");
        for table in case["tables"].as_array().expect("tables") {
            let length = table["sequence_length"].as_u64().expect("a length") as usize;
            let computed = config.rope.inverse_frequencies(config.head_dim, length);
            let what = format!("{:?} at {length}", config.rope);
            assert_close(&config.rope, &computed, &floats(&table["inverse_frequencies"]), &what);
        }
    }
}

#[test]
fn only_dynamic_looks_at_the_length_and_only_beyond_the_original() {
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    for scaling in [RopeScaling::Default, RopeScaling::Linear { factor: 2.0 }, llama3] {
        let rope = RopeConfig { theta: 10_000.0, scaling };
        assert_eq!(rope.inverse_frequencies(64, 1), rope.inverse_frequencies(64, 1 << 20));
    }
    let plain = RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default };
    let dynamic =
        RopeConfig { theta: 10_000.0, scaling: RopeScaling::Dynamic { factor: 2.0, original: 100 } };
    assert_eq!(dynamic.inverse_frequencies(64, 100), plain.inverse_frequencies(64, 100));
    assert_ne!(dynamic.inverse_frequencies(64, 101), plain.inverse_frequencies(64, 101));
}
