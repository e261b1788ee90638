//! Model directories and generation_config.json.

use std::fs;

use fastkv::model::{GenerationConfig, ModelDir};
use serde_json::json;
use tempfile::TempDir;

use super::{assert_refused, copy_of_model, fixtures};

#[test]
fn what_is_not_a_model_directory_is_refused() {
    assert_refused(ModelDir::open(fixtures().join("nowhere")), &["nowhere"]);
    assert_refused(ModelDir::open(fixtures().join("rope.json")), &["rope.json", "not a directory"]);
    let empty = TempDir::new().expect("temporary directory");
    assert_refused(ModelDir::open(empty.path()), &["config.json", "no such file"]);
    fs::create_dir(empty.path().join("config.json")).expect("created");
    assert_refused(ModelDir::open(empty.path()), &["config.json"]);
}

#[test]
fn generation_config_gives_stop_tokens_and_sampling() {
    let copy = copy_of_model("bf16-gqa16-tied");
    let file = copy.path().join("generation_config.json");
    let open = |text: &str| {
        fs::write(&file, text).expect("written");
        ModelDir::open(copy.path()).map(|model| model.generation)
    };
    let from_config = ModelDir::open(copy.path()).expect("no generation config is fine").generation;
    assert_eq!(from_config.stop_tokens, [2, 5]);
    assert_eq!((from_config.do_sample, from_config.temperature), (false, None));

    let text = json!({"bos_token_id": 1, "do_sample": true, "eos_token_id": [9, 7, 9], "temperature": 0.6,
        "top_p": 0.9, "top_k": 50, "transformers_version": "4.43.0"});
    let read = open(&text.to_string()).expect("valid");
    assert_eq!((read.stop_tokens, read.do_sample), (vec![7, 9], true));
    assert_eq!((read.temperature, read.top_p, read.top_k), (Some(0.6), Some(0.9), Some(50)));
    assert_eq!(open("{\"eos_token_id\": 3}").expect("valid").stop_tokens, [3]);
    assert_eq!(open("{\"eos_token_id\": null}").expect("valid").stop_tokens, [2, 5]);
    assert_eq!(open("{}").expect("valid"), from_config);
    let greedy = open("{\"do_sample\": true, \"temperature\": 0.0, \"top_k\": 0}").expect("valid");
    assert_eq!((greedy.do_sample, greedy.temperature, greedy.top_k), (false, None, None));

    for (text, parts) in [
        ("", vec!["JSON"]),
        ("[]", vec!["object"]),
        ("{\"eos_token_id\": 96}", vec!["eos_token_id", "96", "vocab_size = 96"]),
        ("{\"eos_token_id\": [1, -2]}", vec!["eos_token_id", "[1,-2]"]),
        ("{\"eos_token_id\": \"</s>\"}", vec!["eos_token_id", "</s>"]),
        ("{\"temperature\": -1}", vec!["temperature", "-1"]),
        ("{\"temperature\": \"hot\"}", vec!["temperature", "hot"]),
        ("{\"top_p\": 0}", vec!["top_p", "above 0"]),
        ("{\"top_p\": 1.5}", vec!["top_p", "1.5"]),
        ("{\"top_k\": -1}", vec!["top_k", "-1"]),
        ("{\"do_sample\": 1}", vec!["do_sample", "true or false"]),
    ] {
        assert_refused(open(text), &[&parts[..], &["generation_config.json"]].concat());
    }
}

#[test]
fn the_defaults_of_a_configuration_are_greedy() {
    let model = ModelDir::open(fixtures().join("models/f32-mha")).expect("valid");
    assert_eq!(GenerationConfig::of(&model.config), model.generation);
    assert_eq!(model.generation.stop_tokens, [2]);
}

#[cfg(feature = "text")]
#[test]
fn a_model_without_text_files_can_still_be_opened() {
    let model = ModelDir::open(fixtures().join("models/f32-mha")).expect("valid");
    assert_refused(model.tokenizer(), &["tokenizer.json", "no such file", "token ids"]);
    assert!(model.chat_template().expect("nothing wrong").is_none());
}
