//! Bad input gets a message that names the value and what would be right; nothing is written.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::support::{Scratch, edit_header, edit_json, fixture, needle, program, refused, stderr};

const DOWN: &str = "model.layers.0.mlp.down_proj.weight";

/// Inspects tokens with outputs asked for, and holds that to be refused and to leave nothing behind.
fn inspect_refused(model: &Path, ids: &str, options: &[&str], code: i32, parts: &[&str]) {
    let scratch = Scratch::new();
    let tokens = scratch.file("tokens.json", ids);
    let mut arguments = vec!["inspect".into(), "--model".into(), model.as_os_str().to_owned()];
    arguments.extend(["--tokens".into(), tokens.into()]);
    arguments.extend(["--out".into(), scratch.path("out.json").into()]);
    arguments.extend(["--picture".into(), scratch.path("out.svg").into()]);
    arguments.extend(options.iter().map(Into::into));
    refused(arguments, code, parts);
    assert_eq!(scratch.names(), ["tokens.json"]);
}

/// A hundred tokens that every fixture knows.
fn ids() -> String {
    json!((0..100).map(|index| index % 90).collect::<Vec<_>>()).to_string()
}

fn model_refused(model: &Path, parts: &[&str]) {
    inspect_refused(model, &ids(), &[], 1, parts);
}

fn policy_refused(options: &[&str], parts: &[&str]) {
    inspect_refused(&fixture("bf16-gqa4"), &ids(), options, 2, parts);
}

#[test]
fn missing_weights() {
    let scratch = Scratch::new();
    let model = scratch.model("bf16-gqa4");
    fs::remove_file(model.join("model.safetensors")).expect("it was there");
    model_refused(&model, &["model.safetensors", "no such file"]);
    model_refused(&scratch.path("nothing"), &["nothing", "No such file"]);
}

#[test]
fn truncated_weights() {
    let scratch = Scratch::new();
    let model = scratch.model("bf16-gqa4");
    let file = model.join("model.safetensors");
    let bytes = fs::read(&file).expect("readable");
    fs::write(&file, &bytes[..bytes.len() - 100]).expect("writable");
    model_refused(&model, &["model.safetensors", "truncated"]);
    fs::write(&file, &bytes[..5]).expect("writable");
    model_refused(&model, &["model.safetensors", "5 bytes are too few"]);
}

#[test]
fn misshaped_weights() {
    let scratch = Scratch::new();
    let model = scratch.model("bf16-gqa4");
    edit_header(&model.join("model.safetensors"), |header| header[DOWN]["shape"] = json!([56, 64]));
    model_refused(&model, &[DOWN, "[56, 64]", "[64, 56]"]);
}

#[test]
fn wrong_dtype() {
    let scratch = Scratch::new();
    let model = scratch.model("bf16-gqa4");
    edit_header(&model.join("model.safetensors"), |header| header[DOWN]["dtype"] = json!("I16"));
    model_refused(&model, &[DOWN, "I16", "BF16, F16, F32"]);
}

#[test]
fn nan_weights() {
    let scratch = Scratch::new();
    let model = scratch.model("bf16-gqa4");
    let file = model.join("model.safetensors");
    let mut bytes = fs::read(&file).expect("readable");
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&0x7fc0_u16.to_le_bytes());
    fs::write(&file, bytes).expect("writable");
    model_refused(&model, &["model.norm.weight", "NaN", "element 63", "finite"]);
}

#[test]
fn absurd_configurations() {
    for (field, value, parts) in [
        ("hidden_size", Value::Null, ["`hidden_size` is missing", "it must be"]),
        ("num_attention_heads", json!(0), ["`num_attention_heads` is 0", "from 1 to"]),
        ("num_key_value_heads", json!(3), ["`num_key_value_heads` is 3", "divisor"]),
        ("head_dim", json!(7), ["`head_dim` is 7", "even"]),
        ("vocab_size", json!("many"), ["`vocab_size` is \"many\"", "it must be"]),
        ("rms_norm_eps", json!(-1.0), ["`rms_norm_eps` is -1", "above 0"]),
        ("hidden_act", json!("gelu"), ["`hidden_act` is \"gelu\"", "silu"]),
    ] {
        let scratch = Scratch::new();
        let model = scratch.model("bf16-gqa4");
        edit_json(&model.join("config.json"), |config| config[field] = value);
        model_refused(&model, &parts);
    }
    let scratch = Scratch::new();
    let model = scratch.model("bf16-gqa4");
    fs::write(model.join("config.json"), "{").expect("writable");
    model_refused(&model, &["config.json", "not valid JSON"]);
}

#[test]
fn a_tokenizer_of_another_model() {
    let scratch = Scratch::new();
    let model = scratch.model("bf16-gqa4");
    fs::copy(needle().join("tokenizer.json"), model.join("tokenizer.json")).expect("writable");
    let arguments = ["generate".as_ref(), "--model".as_ref(), model.as_os_str(), "hello".as_ref()];
    refused(arguments, 1, &["tokenizer.json", "vocab_size = 96", "another model"]);
}

#[test]
fn text_without_a_tokenizer() {
    let model = fixture("bf16-gqa4");
    let arguments = ["generate".as_ref(), "--model".as_ref(), model.as_os_str(), "hello".as_ref()];
    refused(arguments, 1, &["tokenizer.json", "give token ids"]);
}

#[test]
fn empty_prompts() {
    inspect_refused(&fixture("bf16-gqa4"), "[]", &[], 1, &["no tokens", "at least one"]);
    let scratch = Scratch::new();
    let [model, file] = [needle(), scratch.file("prompt.txt", "\n")].map(PathBuf::into_os_string);
    let base = || ["generate".as_ref(), "--model".as_ref(), model.as_os_str()];
    refused(base().into_iter().chain(["".as_ref()]), 1, &["the prompt is empty"]);
    refused(base().into_iter().chain(["--file".as_ref(), file.as_os_str()]), 1, &["the prompt is empty"]);
    // Stdin is empty here.
    refused(base(), 1, &["the prompt is empty"]);
}

#[test]
fn prompts_beyond_the_context() {
    let ids = |count: usize| json!(vec![1; count]).to_string();
    let parts = ["257 tokens", "256", "max_position_embeddings"];
    inspect_refused(&fixture("bf16-gqa4"), &ids(257), &[], 1, &parts);
    let parts = ["161 tokens", "160", "40 times the dynamic RoPE factor 4"];
    inspect_refused(&fixture("f32-dynamic"), &ids(161), &[], 1, &parts);
}

#[test]
fn tokens_that_are_none() {
    let model = fixture("bf16-gqa4");
    inspect_refused(&model, "[1, 96]", &[], 1, &["token 96 at position 1", "vocabulary of 96"]);
    inspect_refused(&model, "[1, -2]", &[], 1, &["element 1 is -2", "JSON array of token ids"]);
    inspect_refused(&model, "[1, 2.5]", &[], 1, &["element 1 is 2.5"]);
    inspect_refused(&model, "{\"ids\": [1]}", &[], 1, &["JSON array of token ids"]);
    inspect_refused(&model, "[1, 2", &[], 1, &["tokens.json", "EOF"]);
}

#[test]
fn budgets_smaller_than_the_window() {
    for policy in ["fastkv", "fastkv-constant", "snapkv"] {
        let options = ["--policy", policy, "--window", "16", "--retention", "16"];
        policy_refused(&options, &["retention is 16 tokens", "the observation window", "at least 17"]);
    }
    let options = ["--policy", "random", "--retention", "8"];
    policy_refused(&options, &["retention is 8 tokens", "at least 9"]);
    policy_refused(&["--propagation", "7"], &["propagation is 7 tokens", "at least 8"]);
    policy_refused(&["--policy", "streamingllm", "--retention", "3"], &["retention is 3", "sinks"]);
    policy_refused(&["--policy", "snapkv", "--retention", "1"], &["retention is 1 token, ", "takes 32"]);
}

#[test]
fn tsp_layers_that_the_model_lacks() {
    policy_refused(&["--tsp-layer", "2"], &["TSP layer is 2", "0 to 1"]);
    policy_refused(&["--tsp-layer", "0-2"], &["TSP layer is 2", "0 to 1"]);
    policy_refused(&["--tsp-layer", "1-0"], &["candidates", "1 to 0", "not above the last"]);
    policy_refused(&["--tsp-layer", "deep"], &["deep", "number of a layer, auto", "8-24"]);
    policy_refused(&["--tsp-layer", "auto", "--tsp-overlap", "1.5"], &["overlap is 1.5", "0 to 1"]);
    policy_refused(&["--tsp-layer", "1", "--tsp-overlap", "0.5"], &["--tsp-overlap", "--tsp-layer auto"]);
    policy_refused(&["--policy", "h2o", "--tsp-layer", "auto"], &["--tsp-layer is not an option", "h2o has"]);
}

#[test]
fn rates_that_are_no_share() {
    for option in ["retention", "propagation"] {
        for value in ["0.0", "-0.5", "1.01", "NaN"] {
            let expected = format!("{option} is {}", value.parse::<f64>().expect("a number"));
            policy_refused(&[&format!("--{option}"), value], &[&expected, "above 0 and at most 1"]);
        }
        policy_refused(&[&format!("--{option}"), "much"], &["much", "rate above 0", "number of tokens"]);
    }
}

#[test]
fn windows_and_kernels_out_of_range() {
    policy_refused(&["--window", "0"], &["window is 0", "1 to 64"]);
    policy_refused(&["--kernel", "4"], &["kernel is 4", "odd"]);
}

#[test]
fn options_that_the_policy_does_not_have() {
    policy_refused(&["--policy", "full", "--retention", "0.1"], &["--retention", "full has no options"]);
    policy_refused(&["--policy", "snapkv", "--tsp-layer", "1"], &["--tsp-layer", "snapkv has --retention"]);
    policy_refused(&["--policy", "nope"], &["nope", "streamingllm"]);
}

#[test]
fn policies_that_do_not_exist_are_near_others() {
    policy_refused(&["--policy", "snapvk"], &["snapvk", "snapkv"]);
    policy_refused(&["--policy", "fastkv+adakw"], &["fastkv+adakv"]);
    policy_refused(&["--policy", "fastkv+full"], &["fastkv+full"]);
    policy_refused(&["--policy", "adakv", "--flor", "0.1"], &["--flor", "--floor"]);
    let model = needle();
    let base = ["eval", "--model", model.to_str().expect("UTF-8"), "--policies"];
    refused(base.into_iter().chain(["full,pyramidvk"]), 2, &["did you mean pyramidkv?", "all, full"]);
}

#[test]
fn shares_out_of_range() {
    for (policy, option, value) in [
        ("adakv", "floor", "-0.1"),
        ("pyramidkv", "steepness", "0.5"),
        ("pyramidinfer", "recent", "1.5"),
        ("pyramidinfer", "decay", "NaN"),
    ] {
        let expected = format!("{option} is {}", value.parse::<f64>().expect("a number"));
        policy_refused(&["--policy", policy, &format!("--{option}"), value], &[&expected]);
    }
    policy_refused(&["--policy", "gemfilter", "--filter-layer", "2"], &["filter layer is 2", "0 to 1"]);
}

#[test]
fn head_scores_of_another_model() {
    let scratch = Scratch::new();
    let file = scratch.file("heads.json", r#"{"0-0": [1.0], "7-0": [0.5]}"#);
    let file = file.to_str().expect("UTF-8");
    policy_refused(&["--policy", "headkv", "--heads", file], &["head 7-0 is of another model", "2 layers"]);
    policy_refused(&["--policy", "headkv"], &["--heads", "fastkv profile heads"]);
    policy_refused(&["--policy", "headkv", "--heads", "nothing.json"], &["nothing.json"]);
    let broken = scratch.file("broken.json", r#"{"0-0": 1}"#);
    policy_refused(&["--policy", "headkv", "--heads", broken.to_str().expect("UTF-8")], &["broken.json"]);
}

#[test]
fn steering_at_what_is_not_there() {
    policy_refused(&["--steer-tokens", "3..5"], &["--steer-heads"]);
    policy_refused(&["--alpha", "0.5"], &["--steer-heads"]);
    policy_refused(&["--steer-best", "2"], &["--steer-heads"]);
    let heads = ["--steer-heads", "0-0,1-2"];
    let with = |options: &[&'static str]| [&heads[..], options].concat();
    policy_refused(&with(&["--steer-tokens", "90..101"]), &["90..101", "100 tokens"]);
    policy_refused(&with(&["--steer-tokens", "5..5"]), &["5..5"]);
    policy_refused(&with(&["--steer-tokens", "5-9"]), &["10..14"]);
    policy_refused(&with(&["--steer", "never said"]), &["never said", "not in the prompt"]);
    policy_refused(&with(&["--steer-tokens", "5..9", "--alpha", "0"]), &["alpha is 0"]);
    policy_refused(&["--steer-tokens", "5..9", "--steer-heads", "0-99"], &["0-99", "2 layers"]);
    policy_refused(&heads, &["at least one span"]);
    let neither = ["--steer-tokens", "5..9", "--steer-heads", "0-0,bogus"];
    let parts = ["0-0,bogus", "3-12,4-1", "No such file"];
    inspect_refused(&fixture("bf16-gqa4"), &ids(), &neither, 1, &parts);
}

#[test]
fn too_large_for_memory() {
    let options = ["--memory-limit", "100KiB"];
    let parts = ["too large", "weights 106.62 KiB", "KV cache", "activations", "100.00 KiB are available"];
    inspect_refused(&fixture("bf16-gqa4"), &ids(), &options, 1, &parts);
    for value in ["much", "-1", "-8GiB"] {
        inspect_refused(
            &fixture("bf16-gqa4"),
            &ids(),
            &["--memory-limit", value],
            2,
            &[value, "give a size", "8GiB"],
        );
    }
}

#[test]
fn bytes_that_are_no_text() {
    let scratch = Scratch::new();
    let needle = needle();
    let needle = needle.to_str().expect("UTF-8");
    let file = scratch.file("latin-1", b"{\"prompt\": \"a\"}\n{\"prompt\": \"caf\xe9\"}\n");
    let file = file.to_str().expect("UTF-8");
    let parts = ["latin-1", "no UTF-8", "offset 31, in line 2, is 0xe9"];
    for arguments in [
        &["generate", "--file", file][..],
        &["batch", file],
        &["eval", "--task-file", file],
        &["eval", "--haystack", file],
    ] {
        refused(arguments.iter().chain(&["--model", needle]), 1, &parts);
    }
    let output = program()
        .args(["generate", "--model", needle])
        .stdin(File::open(file).expect("readable"))
        .output()
        .expect("the program starts");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("the prompt on stdin: no UTF-8"), "{}", stderr(&output));
}

/// Results of before are found before anyone looks for the model, which is not there.
#[test]
fn files_that_are_there_already() {
    let scratch = Scratch::new();
    let file = scratch.file("results.svg", "precious");
    let path = file.to_str().expect("UTF-8");
    let [empty, ids] =
        [scratch.file("empty.svg", ""), scratch.file("ids.json", "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]")];
    let [empty, ids] = [&empty, &ids].map(|path| path.to_str().expect("UTF-8"));
    let said = [path, "there already", "--force"];
    for (command, option) in [
        ("inspect", "--out"),
        ("inspect", "--picture"),
        ("compare", "--out"),
        ("bench", "--out"),
        ("bench", "--picture"),
        ("profile heads", "--out"),
    ] {
        let with = |options: &[&'static str], path| {
            let model = ["--model", "no such model", option, path];
            command.split(' ').chain(model).chain(options.to_vec()).map(str::to_owned).collect::<Vec<_>>()
        };
        refused(with(&[], path), 2, &[&said[..], &[option]].concat());
        refused(with(&["--force"], path), 1, &["no such model"]);
        // What is empty, or no plain file, has nothing to lose.
        refused(with(&[], empty), 1, &["no such model"]);
        if option == "--out" {
            refused(with(&[], "/dev/null"), 1, &["no such model"]);
        }
    }
    // Output that goes to a file goes behind what is in it.
    let log = scratch.file("log", "before\n");
    let status = program()
        .args(["inspect", "--tokens", ids, "--out", "/dev/stdout", "--model"])
        .arg(needle())
        .stdout(File::options().append(true).open(&log).expect("writable"))
        .status()
        .expect("the program starts");
    assert!(status.success());
    let log = fs::read_to_string(&log).expect("readable");
    assert!(log.starts_with("before\n") && log.contains("\"fastkv\""), "{log}");
    assert_eq!(fs::read_to_string(&file).expect("readable"), "precious");
}

/// There is no such model: an output that cannot be written is found before anyone looks for it.
#[test]
fn unwritable_outputs_are_found_first() {
    let scratch = Scratch::new();
    let directory = scratch.path("");
    let inside_nothing = scratch.path("nothing/out.svg");
    for option in ["--out", "--picture"] {
        let base = ["inspect", "--model", "no such model", "--tokens", "no such file", option];
        let path = inside_nothing.to_str().expect("UTF-8");
        refused(base.into_iter().chain([path]), 1, &[path, "cannot be written"]);
    }
    let base = ["compare", "--model", "no such model", "--tokens", "no such file", "--out"];
    let path = directory.to_str().expect("UTF-8");
    refused(base.into_iter().chain([path]), 1, &[path, "directory"]);
    let base = ["inspect", "--model", "no such model", "--picture"];
    refused(base.into_iter().chain(["a.png"]), 2, &["a.png", ".svg or .html"]);
    refused(base.into_iter().chain(["a.svg", "--out", "a.svg"]), 2, &["a.svg", "two files"]);
    assert!(scratch.names().is_empty());
}

#[test]
fn sampling_out_of_range() {
    let base = ["generate", "--model", "no such model", "hello"];
    refused(base.into_iter().chain(["--temperature", "-1"]), 2, &["temperature is -1", "from 0"]);
    refused(base.into_iter().chain(["--top-p", "1.5"]), 2, &["top-p is 1.5", "at most 1"]);
}

#[test]
fn what_else_makes_no_sense() {
    let needle = needle();
    let needle = needle.to_str().expect("UTF-8");
    let base = ["generate", "--model", needle, "the magic number"];
    refused(base.into_iter().chain(["--stop", "384"]), 2, &["--stop 384", "0 to 383"]);
    refused(base.into_iter().chain(["--chat"]), 1, &["chat template"]);
    refused(base.into_iter().chain(["--file", "x"]), 2, &["--file"]);
    refused(base.into_iter().chain(["--question", " "]), 2, &["--question is empty"]);
    let scratch = Scratch::new();
    let tokens = scratch.file("tokens.json", "[1, 2]");
    let tokens = ["generate", "--model", needle, "--tokens", tokens.to_str().expect("UTF-8")];
    refused(tokens.into_iter().chain(["--question", " "]), 2, &["--question is empty"]);
    refused(base.into_iter().chain(["--threads", "0"]), 2, &["--threads"]);
    refused(["compare", "--model", needle, "--policies", "full,full", "a"], 2, &["names full twice"]);
    refused(["info", "--model", needle, "--tokens", "9000"], 2, &["--tokens 9000", "8192"]);
    refused(["generate", "hello"], 2, &["--model"]);
    refused(["nonsense"], 2, &["nonsense"]);
}
