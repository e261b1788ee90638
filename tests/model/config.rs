//! config.json: every spelling that is published, and what must be refused.

use fastkv::model::{Architecture, LlamaConfig, RopeConfig, RopeScaling};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{assert_refused, fixture_dirs, fixtures, read_json};

/// The shape of Llama 3.1 8B.
fn published() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 128256
    })
}

fn with(patch: Value) -> Value {
    let mut config = published();
    for (field, value) in patch.as_object().expect("an object") {
        config[field] = value.clone();
    }
    config
}

fn without(field: &str) -> Value {
    let mut config = published();
    config.as_object_mut().expect("an object").remove(field).expect("the field was there");
    config
}

#[track_caller]
fn read(config: &Value) -> LlamaConfig {
    LlamaConfig::from_json(&config.to_string()).unwrap_or_else(|error| panic!("{error}"))
}

#[track_caller]
fn refused(config: &Value, parts: &[&str]) {
    assert_refused(LlamaConfig::from_json(&config.to_string()), &[parts, &["config.json"]].concat());
}

#[test]
fn reads_a_published_llama() {
    let config = read(&published());
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (128256, 4096, 14336));
    assert_eq!((config.num_layers, config.query_heads, config.kv_heads, config.head_dim), (32, 32, 8, 128));
    assert_eq!(config.gqa_ratio(), 4);
    assert_eq!(config.rms_norm_eps, 1e-5);
    assert_eq!((config.tie_word_embeddings, config.attention_bias, config.mlp_bias), (false, false, false));
    assert_eq!((config.max_position_embeddings, config.sliding_window), (131072, None));
    assert_eq!(
        (config.bos_token_id, config.eos_token_ids.as_slice()),
        (Some(128000), &[128001, 128008, 128009][..])
    );
    assert_eq!(config.dtype.as_deref(), Some("bfloat16"));
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(config.rope, RopeConfig { theta: 500_000.0, scaling });
}

#[test]
fn reads_a_published_mistral() {
    let mistral = json!({
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "bfloat16",
        "vocab_size": 32000
    });
    let config = read(&mistral);
    assert_eq!((config.architecture, config.sliding_window), (Architecture::Mistral, Some(4096)));
    let limit = config.context_limit();
    assert_eq!((limit.tokens, limit.reason.as_str()), (4096, "sliding_window = 4096"));

    let mut changed = mistral.clone();
    changed["sliding_window"] = Value::Null;
    assert_eq!(read(&changed).context_limit().tokens, 32768);
    changed["sliding_window"] = json!(65536);
    assert_eq!(read(&changed).context_limit().tokens, 32768);
    changed["sliding_window"] = json!(512);
    changed["use_sliding_window"] = json!(false);
    assert_eq!(read(&changed).sliding_window, None);

    // Where the keys are absent MistralConfig has numbers of its own.
    let mut silent = mistral;
    let fields = silent.as_object_mut().expect("an object");
    fields.remove("sliding_window");
    fields.remove("num_key_value_heads");
    let config = read(&silent);
    assert_eq!((config.sliding_window, config.kv_heads), (Some(4096), 8));
}

#[test]
fn absent_and_null_take_the_defaults_of_transformers() {
    for config in [without("num_key_value_heads"), with(json!({"num_key_value_heads": null}))] {
        assert_eq!(read(&config).kv_heads, 32);
    }
    for config in [
        without("hidden_act"),
        without("tie_word_embeddings"),
        without("attention_bias"),
        without("mlp_bias"),
    ] {
        assert_eq!(read(&config), read(&published()));
    }
    assert_eq!(read(&without("rms_norm_eps")).rms_norm_eps, 1e-6);
    assert_eq!(read(&without("rope_theta")).rope.theta, 10_000.0);
    assert_eq!(read(&without("rope_scaling")).rope.scaling, RopeScaling::Default);
    assert_eq!(read(&with(json!({"eos_token_id": null}))).eos_token_ids, [0_u32; 0]);
    assert_eq!(read(&with(json!({"eos_token_id": 7}))).eos_token_ids, [7]);
    assert_eq!(read(&with(json!({"head_dim": null}))).head_dim, 128);
    assert_eq!(read(&with(json!({"head_dim": 64}))).head_dim, 64);
    assert_eq!(read(&with(json!({"pretraining_tp": 2}))), read(&published()));
    assert_eq!(read(&without("architectures")), read(&published()));
    assert_eq!(read(&without("model_type")), read(&published()));
}

#[test]
fn rope_is_read_in_all_spellings() {
    let linear = RopeConfig { theta: 500_000.0, scaling: RopeScaling::Linear { factor: 4.0 } };
    for rope in [json!({"type": "linear", "factor": 4}), json!({"rope_type": "linear", "factor": 4.0})] {
        assert_eq!(read(&with(json!({"rope_scaling": rope}))).rope, linear);
    }
    let mut newest = without("rope_scaling");
    newest["rope_parameters"] = json!({"rope_type": "linear", "factor": 4, "rope_theta": 500000});
    newest.as_object_mut().expect("an object").remove("rope_theta");
    assert_eq!(read(&newest).rope, linear);
    // The theta inside wins, the old name of the object wins.
    newest["rope_theta"] = json!(7.0);
    assert_eq!(read(&newest).rope, linear);
    newest["rope_scaling"] = json!({"type": "default"});
    assert_eq!(read(&newest).rope, RopeConfig { theta: 7.0, scaling: RopeScaling::Default });
    newest["rope_scaling"] = json!({});
    assert_eq!(read(&newest).rope, linear);

    let dynamic = read(&with(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}})));
    assert_eq!(dynamic.rope.scaling, RopeScaling::Dynamic { factor: 2.0, original: 131072 });
    let mut outside = published();
    outside["original_max_position_embeddings"] = json!(4096);
    let RopeScaling::Llama3 { original_max_position_embeddings: original, .. } = read(&outside).rope.scaling
    else {
        panic!("not llama3")
    };
    assert_eq!(original, 4096);
}

#[test]
fn context_limit_follows_the_rope_type() {
    let limit = |patch| {
        let limit = read(&with(patch)).context_limit();
        (limit.tokens, limit.reason)
    };
    let (tokens, reason) = limit(json!({"rope_scaling": null, "max_position_embeddings": 8192}));
    assert_eq!((tokens, reason.as_str()), (8192, "max_position_embeddings = 8192"));
    let linear = json!({"rope_scaling": {"type": "linear", "factor": 2.5}, "max_position_embeddings": 4096});
    let (tokens, reason) = limit(linear);
    assert_eq!(
        (tokens, reason.as_str()),
        (10240, "max_position_embeddings = 4096 times the linear RoPE factor 2.5")
    );
    let dynamic = json!({"rope_scaling": {"type": "dynamic", "factor": 4}, "max_position_embeddings": 2048});
    assert_eq!(limit(dynamic).0, 8192);
    assert_eq!(limit(json!({})).0, 131072);
    // 8192 times 8 counts where max_position_embeddings was left at the original.
    let (tokens, reason) = limit(json!({"max_position_embeddings": 8192}));
    assert_eq!(tokens, 65536);
    assert!(reason.contains("llama3 RoPE factor 8"), "{reason}");
    // Llama 3.2 1B and 3B, whose factor is not what the context was stretched by.
    let mut scaling = published()["rope_scaling"].clone();
    scaling["factor"] = json!(32.0);
    let (tokens, reason) = limit(json!({"rope_scaling": scaling}));
    assert_eq!((tokens, reason.as_str()), (131072, "max_position_embeddings = 131072"));
    let (tokens, reason) = limit(json!({"sliding_window": 1000}));
    assert_eq!((tokens, reason.as_str()), (1000, "sliding_window = 1000"));
    let huge = json!({"rope_scaling": {"type": "linear", "factor": 1e300}});
    assert_eq!(limit(huge).0, i32::MAX as usize);
}

#[test]
fn other_models_are_refused_by_name() {
    refused(
        &with(json!({"model_type": "qwen2"})),
        &["model_type", "\"qwen2\"", "LlamaForCausalLM", "mistral"],
    );
    refused(
        &with(json!({"architectures": ["LlamaForSequenceClassification"]})),
        &["LlamaForSequenceClassification"],
    );
    refused(&with(json!({"model_type": null, "architectures": null})), &["model_type", "missing"]);
    refused(&with(json!({"model_type": null, "architectures": []})), &["model_type", "missing"]);
    refused(&with(json!({"hidden_act": "gelu"})), &["hidden_act", "\"gelu\"", "supported: silu"]);
    refused(
        &with(json!({"quantization_config": {"quant_method": "gptq", "bits": 4}})),
        &["quantization_config", "gptq"],
    );
    refused(&with(json!({"partial_rotary_factor": 0.5})), &["partial_rotary_factor", "0.5"]);
    refused(
        &with(json!({"layer_types": ["full_attention", "linear_attention"]})),
        &["layer_types", "linear_attention"],
    );
    for name in ["yarn", "longrope", "su", "mrope", "ntk"] {
        for key in ["type", "rope_type"] {
            let rope = json!({"rope_scaling": {key: name, "factor": 2.0}});
            refused(&with(rope), &[&format!("rope_scaling.{key}"), name, "default, linear, dynamic, llama3"]);
        }
    }
    let nested = json!({"rope_scaling": {"full_attention": {"rope_type": "default"}}});
    refused(&with(nested), &["rope_scaling.full_attention"]);
}

#[test]
fn absurd_values_are_refused_with_field_value_and_remedy() {
    let sizes = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ];
    let nonsense = [
        json!(0),
        json!(-1),
        json!(1.5),
        json!("32"),
        json!([32]),
        json!(true),
        json!({}),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e300),
    ];
    for field in sizes {
        for value in &nonsense {
            refused(&with(json!({field: value})), &[field, &value.to_string(), "a whole number from 1 to"]);
        }
    }
    for field in sizes.iter().filter(|field| **field != "num_key_value_heads") {
        refused(&without(field), &[field, "missing"]);
        refused(&with(json!({*field: null})), &[field, "missing"]);
    }
    refused(&with(json!({"num_key_value_heads": 5})), &["num_key_value_heads", "5", "divisor", "32"]);
    refused(&with(json!({"num_key_value_heads": 64})), &["num_key_value_heads", "64", "divisor"]);
    refused(&with(json!({"num_key_value_heads": 1})), &["num_key_value_heads", "32 to 1", "/ 16"]);
    for head_dim in [0, 1, 127, 258, -2] {
        refused(&with(json!({"head_dim": head_dim})), &["head_dim", &head_dim.to_string()]);
    }
    refused(&with(json!({"hidden_size": 4100})), &["hidden_size", "4100", "multiple of num_attention_heads"]);
    refused(&with(json!({"hidden_size": 32 * 127})), &["hidden_size", "head_dim", "127", "even"]);
    refused(&with(json!({"hidden_size": 32 * 512})), &["hidden_size", "512", "256"]);
    for eps in [json!(0), json!(-1e-5), json!(1e-60), json!(2), json!("1e-5")] {
        refused(&with(json!({"rms_norm_eps": eps})), &["rms_norm_eps", &eps.to_string(), "above 0"]);
    }
    for theta in [json!(0), json!(-1), json!("x"), json!(1e300)] {
        refused(&with(json!({"rope_theta": theta})), &["rope_theta", &theta.to_string(), "above 0"]);
        let inside = json!({"rope_scaling": {"rope_type": "default", "rope_theta": theta}});
        refused(&with(inside), &["rope_scaling.rope_theta", &theta.to_string()]);
    }
    for kind in ["linear", "dynamic", "llama3"] {
        for factor in [json!(0.5), json!(0), json!(-8), json!("8")] {
            let mut config = published();
            config["rope_scaling"]["rope_type"] = json!(kind);
            config["rope_scaling"]["factor"] = factor.clone();
            refused(&config, &["rope_scaling.factor", &factor.to_string(), "at least 1"]);
        }
        let mut config = published();
        config["rope_scaling"] = json!({"type": kind, "low_freq_factor": 1, "high_freq_factor": 4});
        refused(&config, &["rope_scaling.factor", "missing"]);
    }
    let mut config = published();
    config["rope_scaling"]["high_freq_factor"] = json!(1.0);
    refused(&config, &["rope_scaling.high_freq_factor", "above low_freq_factor = 1"]);
    config["rope_scaling"]["low_freq_factor"] = json!(0.0);
    refused(&config, &["rope_scaling.low_freq_factor"]);
    for field in ["attention_bias", "mlp_bias", "tie_word_embeddings"] {
        refused(&with(json!({field: "no"})), &[field, "\"no\"", "true or false"]);
    }
    for window in [json!(0), json!(-1), json!("4096")] {
        refused(&with(json!({"sliding_window": window})), &["sliding_window", &window.to_string()]);
    }
    for token in [json!(128256), json!(-1), json!([1, "2"]), json!("</s>")] {
        refused(
            &with(json!({"eos_token_id": token})),
            &["eos_token_id", &token.to_string(), "vocab_size = 128256"],
        );
    }
    refused(&with(json!({"bos_token_id": 1_000_000})), &["bos_token_id", "1000000"]);
    refused(&with(json!({"rope_scaling": "linear"})), &["rope_scaling", "\"linear\"", "an object"]);
    refused(
        &with(json!({"hidden_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1,
        "rope_scaling": {"type": "dynamic", "factor": 2}})),
        &["head_dim", "dynamic"],
    );
}

#[test]
fn what_is_not_an_object_is_refused() {
    for text in ["", "{", "[]", "3", "null", "{\"vocab_size\": NaN}", "{\"vocab_size\": 1e999}", "\u{feff}{}"]
    {
        assert_refused(LlamaConfig::from_json(text), &["config.json"]);
    }
    assert_refused(LlamaConfig::from_json(&"[".repeat(100_000)), &["config.json", "JSON"]);
    let long = with(json!({"model_type": "x".repeat(100_000)}));
    let message = LlamaConfig::from_json(&long.to_string()).expect_err("no such model").to_string();
    assert!(message.len() < 1000, "{} bytes of message", message.len());
}

#[test]
fn the_configuration_can_be_written_down() {
    let written = serde_json::to_value(read(&published())).expect("serialises");
    assert_eq!(written["kv_heads"], 8);
    assert_eq!(written["architecture"], "llama");
    assert_eq!(written["rope"]["scaling"]["rope_type"], "llama3");
}

#[test]
fn fixtures_are_read_as_they_were_made() {
    for directory in fixture_dirs("models") {
        let config =
            LlamaConfig::from_file(&directory.join("config.json")).unwrap_or_else(|error| panic!("{error}"));
        let name = directory.file_name().expect("name").to_string_lossy().into_owned();
        assert_eq!(config.vocab_size, 96, "{name}");
        assert_eq!(config.tie_word_embeddings, name == "bf16-gqa16-tied" || name == "bf16-llama3", "{name}");
        assert_eq!(config.attention_bias && config.mlp_bias, name == "f32-bias", "{name}");
        assert_eq!(config.sliding_window, (name == "f32-mistral-window").then_some(128), "{name}");
        let ids =
            read_json(&directory.join("expected.json"))["prompts"][0]["ids"].as_array().expect("ids").len();
        assert!(ids + 8 <= config.context_limit().tokens, "{name}");
        if name == "f32-dynamic" {
            assert!(ids > config.max_position_embeddings);
        }
    }
    assert!(fixtures().join("models/bf16-mistral/config.json").exists());
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0_u64..100).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9]{0,8}".prop_map(Value::from),
        prop_oneof![Just("linear"), Just("dynamic"), Just("llama3"), Just("default")].prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec(
                (prop_oneof![Just("type"), Just("rope_type"), Just("factor"), Just("rope_theta")], inner),
                0..4
            )
            .prop_map(|fields| fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever stands in some fields, there is an answer; and an accepted one can be used.
    #[test]
    fn any_value_in_any_field_is_answered(
        fields in prop::collection::vec((prop::sample::select(published().as_object().expect("an object")
            .keys().cloned().chain(["head_dim", "sliding_window", "rope_parameters", "original_max_position_embeddings",
                "layer_types", "use_sliding_window", "quantization_config"].map(str::to_owned))
            .collect::<Vec<_>>()), any_json()), 1..4)
    ) {
        let mut config = published();
        for (field, value) in fields {
            config[field.as_str()] = value;
        }
        if let Ok(config) = LlamaConfig::from_json(&config.to_string()) {
            prop_assert!(config.context_limit().tokens > 0);
            prop_assert!(config.vocab_size.checked_mul(config.hidden_size).is_some());
            let frequencies = config.rope.inverse_frequencies(config.head_dim, 1 << 20);
            prop_assert_eq!(frequencies.len(), config.head_dim / 2);
            prop_assert!(frequencies.iter().all(|frequency| !frequency.is_nan()));
        }
    }
}
